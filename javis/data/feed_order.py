"""Which clips come in which batch: pure functions of the manifest, the plan and the epoch, the same on every rank."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from javis.data.excerpt import ExcerptRequest, Place
from javis.errors import UsageError

if TYPE_CHECKING:
    from javis.data.feed import FeedPlan, SkippedClip
    from javis.data.manifest import Manifest

# Streams of random numbers of one seed.
_ORDER, _BATCHES, _START, _SUBSTITUTE = range(4)


class ClipShape(NamedTuple):
    """Size of the clips of a batch, and how many of them a rank gets."""

    num_frames: int
    height: int
    width: int
    batch: int


class Group(NamedTuple):
    """Clips that can be in one batch."""

    shape: ClipShape
    members: NDArray[np.int64]  # rows of the manifest


@dataclass(frozen=True)
class BatchSpec:
    """One batch of one rank."""

    epoch: int
    number: int  # within the epoch
    group: Group
    indices: tuple[int, ...]  # rows of the manifest


class EpochOrder:
    """Batches of every epoch.

    The clips of a global batch (of all ranks together) do not depend on how many ranks share it.

    Args:
        manifest, plan: what to feed.

    Attributes:
        left_out: clips whose manifest says that they are too short or have no sound.

    Raises:
        UsageError: no batch at all.
    """

    def __init__(self, manifest: Manifest, plan: FeedPlan) -> None:
        self.manifest, self.plan = manifest, plan
        if plan.buckets is not None and plan.buckets.fps not in (None, plan.fps):
            raise UsageError(
                f"the buckets are for {plan.buckets.fps:g} fps and the feed plan for {plan.fps:g}; give the same rate"
            )
        self.left_out = _left_out(manifest, plan)
        gone = {clip.index for clip in self.left_out}
        self._usable = np.array([i for i in range(len(manifest)) if i not in gone], np.int64)
        self._epochs: dict[int, list[BatchSpec]] = {}
        if not self.batches(0):
            raise UsageError(self._why_none())

    def batches(self, epoch: int) -> list[BatchSpec]:
        """This rank's batches of an epoch, in order; as many on every rank."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # two are in use: batches are made ahead into the next one
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._batches(epoch)
        return self._epochs[epoch]

    def _batches(self, epoch: int) -> list[BatchSpec]:
        made: list[tuple[Group, tuple[int, ...]]] = []
        for number, group in enumerate(self._groups(epoch)):
            order = group.members
            if self.plan.shuffle:
                order = order[self._random(_ORDER, epoch, number).permutation(len(order))]
            together = group.shape.batch * self.plan.world
            if self.plan.last == "fill":
                order = np.resize(order, -(-len(order) // together) * together)  # repeats from the beginning
            for start in range(0, len(order) - together + 1, together):
                mine = order[start : start + together][self.plan.rank :: self.plan.world]
                made.append((group, tuple(map(int, mine))))
        turns = self._random(_BATCHES, epoch).permutation(len(made)) if self.plan.shuffle else range(len(made))
        return [BatchSpec(epoch, n, *made[turn]) for n, turn in enumerate(turns)]

    def _groups(self, epoch: int) -> list[Group]:
        plan = self.plan
        if plan.buckets is None:
            return [Group(ClipShape(plan.num_frames, plan.height, plan.width, plan.batch), self._usable)]
        buckets = dataclasses.replace(plan.buckets, fps=plan.fps)
        places: dict[ClipShape, list[int]] = {}
        for index in map(int, self._usable):
            row = self.manifest[index]
            bucket = buckets.assign(row, plan.seed * 1_000_003 + epoch)
            if bucket is not None:
                shape = ClipShape(bucket.num_frames, *bucket.size(row)[:2], bucket.batch)
                places.setdefault(shape, []).append(index)
        return [Group(shape, np.array(places[shape], np.int64)) for shape in sorted(places)]

    def _why_none(self) -> str:
        if not len(self._usable):
            first = self.left_out[0]
            return f"no clip fits the feed plan; the first one, {first.path}, {first.reason}"
        if self.plan.buckets is not None:
            return f"no clip fits the buckets {self.plan.buckets}; give smaller ones, or last='fill'"
        return (
            f"{len(self._usable)} clips are less than one batch of {self.plan.batch} on {self.plan.world} ranks; give "
            "a smaller batch, or last='fill'"
        )

    def substitute(self, spec: BatchSpec, slot: int, attempt: int) -> int:
        """The clip that takes the place of a broken one; ``attempt`` 0 is the first try after it."""
        draw = self._random(_SUBSTITUTE, spec.epoch, spec.number, self.plan.rank, slot, attempt)
        return int(spec.group.members[draw.integers(len(spec.group.members))])

    def request(self, spec: BatchSpec, index: int) -> ExcerptRequest:
        """What is wanted of the clip ``index`` in this batch."""
        plan, shape = self.plan, spec.group.shape
        path, audio_path = self._places(index)
        start = float(self._random(_START, spec.epoch, index).random()) if plan.random_start else 0.0
        return ExcerptRequest(
            path=path, audio_path=audio_path, num_frames=shape.num_frames, height=shape.height,
            width=shape.width, fps=plan.fps, sample_rate=plan.sample_rate, start=start, audio_gap=plan.audio_gap,
        )  # fmt: skip

    def _places(self, index: int) -> tuple[Place, Place]:
        """Video and sound of a clip. Members of shards are parts of their tar files, so that nothing is searched."""
        from javis.data.shards import ShardedManifest

        if isinstance(self.manifest, ShardedManifest):
            return self.manifest.slices(index)
        row = self.manifest[index]
        return row.path, row.audio_path

    def fingerprint(self) -> str:
        """Of all that the order of global batches depends on; not of the rank, nor of how many ranks share a batch."""
        plan, digest = self.plan, hashlib.blake2b(digest_size=12)
        if plan.buckets is None:
            sizes: object = (plan.num_frames, plan.height, plan.width, plan.batch * plan.world)
        else:
            sizes = [(b.resolution, b.num_frames, b.probability, b.batch * plan.world) for b in plan.buckets.buckets]
        options = (plan.fps, plan.sample_rate, plan.seed, plan.shuffle, plan.random_start, plan.last)
        digest.update(repr((sizes, options)).encode())
        for row in self.manifest:
            digest.update(f"{row.id}\0{row.relpath}\0{row.num_frames}\0".encode())
        return digest.hexdigest()

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.plan.seed, *stream])


def _left_out(manifest: Manifest, plan: FeedPlan) -> list[SkippedClip]:
    from javis.data.feed import SkippedClip

    lengths: Sequence[int] = (
        [plan.num_frames] if plan.buckets is None else [bucket.num_frames for bucket in plan.buckets.buckets]
    )
    wanted = min(lengths) / plan.fps
    out = []
    for index, row in enumerate(manifest):
        if not row.audio_path:
            out.append(SkippedClip(row.path, "has no sound", index))
        elif row.seconds + 0.5 / row.fps < wanted:
            out.append(SkippedClip(row.path, f"lasts {row.seconds:.3g} s, and {wanted:.3g} s are wanted", index))
    return out
