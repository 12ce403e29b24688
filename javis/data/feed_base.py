"""What the feeders share: epochs, batches made ahead, the position, and clips that cannot be used."""

from __future__ import annotations

import concurrent.futures
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from javis.data.excerpt import BadClip, ExcerptRequest
from javis.data.feed import MediaBatch, SkippedClip
from javis.data.feed_order import BatchSpec, EpochOrder
from javis.data.feed_workers import Workers
from javis.errors import FailedError, UsageError

if TYPE_CHECKING:
    from javis.data.feed import FeedPlan
    from javis.data.manifest import Manifest

MOST_SUBSTITUTES = 64  # broken clips in a row, after which the data and not a clip is to blame
_FORMAT = 1  # of the state

Pending = TypeVar("Pending")
T = TypeVar("T")


class OrderedFeeder(ABC, Generic[Pending]):
    """Order, position and substitutes of a feeder; a backend begins batches and finishes them.

    A broken clip is replaced by another one of its group, drawn from the seed: which clips are broken decides the
    batches, and nothing else does.
    """

    def __init__(self, manifest: Manifest, plan: FeedPlan) -> None:
        self.manifest, self.plan = manifest, plan
        self.order = EpochOrder(manifest, plan)
        self.skipped: list[SkippedClip] = list(self.order.left_out)
        self._broken: dict[int, str] = {}
        self._lock = threading.Lock()
        self._epoch, self._number = 0, 0  # of the batch that comes next
        self._ahead: deque[tuple[BatchSpec, Pending]] = deque()
        self._next: tuple[int, int] | None = None  # of the batch to begin next; None: the one that comes next
        self._closed = False
        self.workers = Workers(plan.workers, plan.timeout)

    # -- what a backend does -------------------------------------------------------------------------------------------

    @abstractmethod
    def _begin(self, spec: BatchSpec) -> Pending:
        """Start making a batch."""

    @abstractmethod
    def _finish(self, spec: BatchSpec, pending: Pending) -> MediaBatch:
        """Wait for it."""

    @abstractmethod
    def _futures(self, pending: Pending) -> Sequence[Future[Any]]:
        """What it is made of."""

    # -- the iterator --------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Of the batch that comes next; with the last batch of an epoch it is still that one."""
        return self._epoch

    def __len__(self) -> int:
        """Batches of the running epoch, on every rank."""
        return len(self.order.batches(self._epoch))

    def __iter__(self) -> Iterator[MediaBatch]:
        if self._number >= len(self):
            self._epoch, self._number = self._epoch + 1, 0
        return self

    def __next__(self) -> MediaBatch:
        if self._closed:
            raise UsageError("the feeder is closed; make a new one")
        if self._number >= len(self):
            raise StopIteration
        self._fill()
        spec, pending = self._ahead.popleft()
        try:
            batch = self._finish(spec, pending)
        except BaseException:
            self._forget()  # whoever goes on after an error gets the same batch once more
            raise
        self._number += 1
        return batch

    def _fill(self) -> None:
        epoch, number = self._next or (self._epoch, self._number)
        while len(self._ahead) <= self.plan.prefetch:
            while number >= len(self.order.batches(epoch)):
                epoch, number = epoch + 1, 0
                if epoch > self._epoch + 100:
                    raise UsageError(f"no clip falls into the buckets {self.plan.buckets} in 100 epochs")
            spec = self.order.batches(epoch)[number]
            self._ahead.append((spec, self._begin(spec)))
            number += 1
        self._next = (epoch, number)

    def _forget(self) -> None:
        for _, pending in self._ahead:
            for future in self._futures(pending):
                future.cancel()
        self._ahead.clear()
        self._next = None

    def rest(self) -> None:
        """Wait until the batches made ahead are finished; they are kept, and nothing works until the next call."""
        for _, pending in self._ahead:
            concurrent.futures.wait(self._futures(pending))

    # -- position ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON values: epoch, batch (the number of the next one), and the clips that were found broken."""
        with self._lock:
            broken = {str(index): reason for index, reason in self._broken.items()}
        return {
            "format": _FORMAT,
            "order": self.order.fingerprint(),
            "epoch": self._epoch,
            "batch": self._number,
            "broken": broken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which the state was taken; the number of ranks may be another, the global batch not.

        Raises:
            UsageError: the state is of another manifest or plan, or no state.
        """
        try:
            form, order = state["format"], state["order"]
            epoch, number = int(state["epoch"]), int(state["batch"])
            broken = {int(index): str(reason) for index, reason in state["broken"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"this is no state of a feeder ({error!r}); give what state_dict returned") from None
        if form != _FORMAT or order != self.order.fingerprint():
            raise UsageError(
                "the state of the feeder is of another manifest or plan (clips, sizes, rate, seed, global batch); "
                "resume with the same ones, or start anew without the state"
            )
        self._forget()
        self._epoch, self._number = epoch, number
        for index, reason in broken.items():
            self._skip(index, reason)

    # -- broken clips --------------------------------------------------------------------------------------------------

    def _skip(self, index: int, reason: str) -> None:
        with self._lock:
            if index not in self._broken:
                self._broken[index] = reason
                self.skipped.append(SkippedClip(self.manifest[index].path, reason, index))

    def _usable(self, spec: BatchSpec, slot: int, use: Callable[[ExcerptRequest], T]) -> tuple[int, T]:
        """What ``use`` makes of the clip of a slot, or of the first substitute that is not broken, and its index.

        Raises:
            FailedError: none of many substitutes can be used.
        """
        for attempt in range(MOST_SUBSTITUTES + 1):
            index = spec.indices[slot] if attempt == 0 else self.order.substitute(spec, slot, attempt - 1)
            if index in self._broken:
                continue
            try:
                return index, use(self.order.request(spec, index))
            except BadClip as error:
                self._skip(index, str(error))
        first = next(iter(self._broken.items()))
        raise FailedError(
            f"{len(self._broken)} of {len(self.manifest)} clips cannot be used, and no substitute was found; the first "
            f"one, {self.manifest[first[0]].path}, {first[1]}; 'javis data check' finds them all"
        )

    # -- ends ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the workers. A closed feeder gives no batches; `state_dict` and `skipped` stay."""
        if not self._closed:
            self._closed = True
            self._forget()
            self.workers.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "workers"):
            self.close()

    def _record(self, spec: BatchSpec, indices: list[int], video: Tensor, waveform: Tensor, mel: Tensor) -> MediaBatch:
        rows = [self.manifest[index] for index in indices]
        return MediaBatch(
            video=video,
            waveform=waveform,
            mel=mel,
            fps=torch.full((len(rows),), float(self.plan.fps), device=video.device),
            captions=[row.text for row in rows],
            ids=[row.id for row in rows],
            indices=indices,
        )
