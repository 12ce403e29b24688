"""`LatentSource`: batches of what ``javis data encode`` has stored, for the training engine."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from javis.data.encode import FORMAT, INDEX, PLAN, VERSION
from javis.data.store import Store
from javis.errors import FailedError, UsageError

OPEN_SHARDS = 16
_ORDER, _TURN = range(2)  # streams of random numbers of one seed


class _Place(NamedTuple):
    shard: int
    row: int


class _Group(NamedTuple):
    """Clips of one shape, which can be in one batch."""

    shape: tuple[int, int, int]  # frames, height, width
    places: list[_Place]


class LatentSource:
    """Stored latents as a ``BatchSource`` (`javis.train.engine`): shuffled, epoch after epoch.

    The clips of a global batch (of all ranks together) depend on the seed and on the clips that were taken before it,
    not on how many ranks share it. A batch holds clips of one shape; the last one of a shape in an epoch is filled up
    with clips that were seen at its beginning. A shard is checked against its sha256 when it is first opened.

    Args:
        where: what ``javis data encode`` wrote. Shards at a URL are copied to ``cache`` when they are first needed.
        batch: clips of one rank in one batch.
        seed: of the order. rank, world: which part of each global batch is given.
        dtype: of latents and hidden states.
        check: False: damaged shards are not looked for.
        cache: folder for copies; None: a temporary one.

    Raises:
        UsageError: nothing finished there, or a record that is damaged.
    """

    def __init__(
        self,
        where: str | os.PathLike[str],
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        dtype: torch.dtype = torch.float32,
        check: bool = True,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if batch < 1 or not 0 <= rank < world or seed < 0:
            raise UsageError(f"unusable batch {batch}, rank {rank} of {world}, or seed {seed}")
        self.store, self.batch, self.seed, self.rank, self.world = Store(where), batch, seed, rank, world
        self.dtype, self.check, self._cache = dtype, check, cache
        index, plan = self.store.read_json(INDEX), self.store.read_json(PLAN)
        if index is None or plan is None:
            raise UsageError(f"{where} holds no finished latents; run 'javis data encode' (again)")
        if (index.get("format"), index.get("version")) != (FORMAT, VERSION):
            raise UsageError(f"{where}: {INDEX} is not of {FORMAT!r} version {VERSION}")
        self.plan: dict[str, Any] = plan["plan"]
        self.shards: list[dict[str, Any]] = index["shards"]
        self.fingerprint = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()[:32]
        self.records: list[dict[str, Any]] = []
        groups: dict[tuple[int, int, int], list[_Place]] = {}
        for number, shard in enumerate(self.shards):
            record = self.store.read_json(f"{shard['name']}.json")
            if record is None or self.store.sha256(f"{shard['name']}.json") != shard["record_sha256"]:
                raise UsageError(f"{where}: {shard['name']}.json is damaged; 'javis data encode' makes it again")
            self.records.append(record)
            places = groups.setdefault(tuple(shard["shape"]), [])
            places += [_Place(number, row) for row in range(len(record["clips"]))]
        self.groups = [_Group(shape, groups[shape]) for shape in sorted(groups) if groups[shape]]
        if not self.groups:
            raise UsageError(f"{where} holds no clip; its records say why they were skipped")
        self.epoch, self.taken = 0, [0] * len(self.groups)
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._checked: set[int] = set()

    def __len__(self) -> int:
        """Clips."""
        return sum(len(group.places) for group in self.groups)

    # -- the order ----------------------------------------------------------------------------------------------------

    def _take(self) -> list[_Place]:
        """This rank's clips of the next batch; moves on."""
        left = np.array([max(0, len(g.places) - t) for g, t in zip(self.groups, self.taken, strict=True)], np.int64)
        if not left.any():
            self.epoch, self.taken = self.epoch + 1, [0] * len(self.groups)
            return self._take()
        turn = np.random.default_rng([self.seed, _TURN, self.epoch, sum(self.taken)])
        chosen = int(turn.choice(len(left), p=left / left.sum()))
        group, start, together = self.groups[chosen], self.taken[chosen], self.batch * self.world
        if (self.epoch, chosen) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] == self.epoch}
            shuffle = np.random.default_rng([self.seed, _ORDER, self.epoch, chosen])
            self._orders[self.epoch, chosen] = shuffle.permutation(len(group.places))
        order = self._orders[self.epoch, chosen]
        self.taken[chosen] = start + together
        repeated: NDArray[np.int64] = np.resize(order, start + together)  # from the beginning where it is too short
        return [group.places[clip] for clip in repeated[start:][self.rank :: self.world]]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch; the same on every rank."""
        return {"data": self.fingerprint, "seed": self.seed, "epoch": self.epoch, "taken": list(self.taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there; with another batch or number of ranks, at the clips that follow.

        Raises:
            UsageError: the state is of other latents or another seed.
        """
        for name, own in (("data", self.fingerprint), ("seed", self.seed)):
            if state.get(name) != own:
                raise UsageError(f"the state is of other {name} ({state.get(name)!r:.40}); expected {own!r:.40}")
        taken = state["taken"]
        if len(taken) != len(self.groups):
            raise UsageError(f"the state has {len(taken)} groups of clips; expected {len(self.groups)}")
        self.epoch, self.taken = int(state["epoch"]), [int(count) for count in taken]

    # -- the clips ----------------------------------------------------------------------------------------------------

    def next(self) -> dict[str, Any]:
        """The next batch.

        Returns:
            ``video`` [B, Cv, T, H, W] and ``audio`` [B, Ca, Ta, M], clean latents; ``text`` [B, L, C], ``text_mask``
            bool [B, L]; ``prior_text`` and ``prior_text_mask``, what priors are estimated from (the very ``text`` where
            the checkpoint has one encoder for both); ``fps``, ``height``, ``width``, ``frames`` float32 [B], of the
            clips, in pixels; ``captions``, ``ids``: lists. Tensors are on the CPU.

        Raises:
            FailedError: a shard is damaged; it is named.
        """
        before = self.epoch, list(self.taken)
        try:
            return self._batch(self._take())
        except FailedError:
            self.epoch, self.taken = before
            raise

    def _batch(self, places: list[_Place]) -> dict[str, Any]:
        told = [self.records[place.shard]["clips"][place.row] for place in places]
        shape = self.records[places[0].shard]["shape"]
        batch: dict[str, Any] = {
            name: torch.stack([self._row(place, name).to(self.dtype) for place in places])
            for name in ("video", "audio")
        }
        batch["text"], batch["text_mask"] = self._texts(places, "text")
        has_own = "prior_text" in self._shard(places[0].shard).keys()  # noqa: SIM118 not a dict
        own = self._texts(places, "prior_text") if has_own else (batch["text"], batch["text_mask"])
        batch["prior_text"], batch["prior_text_mask"] = own
        for name, value in zip(("frames", "height", "width", "fps"), (*shape, self.plan["fps"]), strict=True):
            batch[name] = torch.full((len(places),), float(value))
        batch["captions"] = [clip["caption"] for clip in told]
        batch["ids"] = [clip["id"] for clip in told]
        return batch

    def _row(self, place: _Place, name: str) -> Tensor:
        row: Tensor = self._shard(place.shard).get_slice(name)[place.row]
        return row

    def _texts(self, places: list[_Place], name: str) -> tuple[Tensor, Tensor]:
        masks = torch.stack([self._row(place, f"{name}_mask") for place in places])
        first: Tensor | None = None
        for number, place in enumerate(places):
            file = self._shard(place.shard)
            ends = file.get_tensor(f"{name}_lengths").long().cumsum(0)
            begin = int(ends[place.row - 1]) if place.row else 0
            rows = file.get_slice(name)[begin : int(ends[place.row])].to(self.dtype)
            if first is None:
                first = torch.zeros(*masks.shape, rows.shape[1], dtype=self.dtype)
            first[number, : len(rows)] = rows
        assert first is not None
        return first, masks

    def _shard(self, number: int) -> Any:
        """The opened file of a shard."""
        from safetensors import SafetensorError, safe_open

        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        name = f"{self.shards[number]['name']}.safetensors"
        path = self._local(name)
        if self.check and number not in self._checked:
            if not path.is_file() or _sha256(path) != self.shards[number]["sha256"]:
                raise self._damaged(name)
            self._checked.add(number)
        try:
            self._open[number] = safe_open(path, "pt")
        except (SafetensorError, OSError):
            raise self._damaged(name) from None
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]

    def _damaged(self, name: str) -> FailedError:
        return FailedError(f"{self.store.where}: {name} is damaged or missing; 'javis data encode' makes it again")

    def _local(self, name: str) -> Path:
        """The shard as a local file."""
        if self.store.is_local:
            return self.store.folder / name
        if self._cache is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="javis-latents-")
            self._cache = self._temporary.name
        copies = Store(self._cache)
        if copies.size(name) is None:
            copies.prepare()
            try:
                with self.store.reading(name) as source, copies.writing(name) as target:
                    while chunk := source.read(1 << 22):
                        target.write(chunk)
            except FileNotFoundError:
                raise self._damaged(name) from None
        return copies.folder / name


def _sha256(path: Path) -> str:
    return str(Store(path.parent).sha256(path.name))
