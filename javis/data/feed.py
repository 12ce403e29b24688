"""Feeding: from files of a manifest to batches of frames, sound and log-mel.

Read in this order: `FeedPlan` (what is wanted), `MediaBatch` (what comes out), `Feeder` (how it is asked for),
`javis.data.feeders.make_feeder` (which one does it). docs/data.md, section "Feeding", has the rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from javis.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from javis.data.buckets import BucketPlan

MEL_BINS = 64  # of AudioLDM2 (javis.model.mel.MelConfig)


@dataclass(frozen=True)
class MediaBatch:
    """Clips of one shape. Frame k of a clip and sample ``k / fps * sample_rate`` are of the same moment."""

    video: Tensor  # uint8 [B, T, H, W, 3], sRGB
    waveform: Tensor  # float32 [B, samples] in [-1, 1], mono, of exactly T / fps seconds
    mel: Tensor  # float32 [B, 1, frames, 64], log-mel of AudioLDM2 (javis.model.mel.fixed_length_log_mel)
    fps: Tensor  # float32 [B], frames per second of ``video``
    captions: list[str]
    ids: list[str]
    indices: list[int]  # rows of the manifest


@dataclass(frozen=True)
class SkippedClip:
    """A clip that could not be used; another one of its bucket took its place."""

    path: str
    reason: str
    index: int  # row of the manifest


@dataclass(frozen=True, kw_only=True)
class FeedPlan:
    """What the batches are, in which order they come, and this rank's share of them."""

    num_frames: int  # frames of a clip; with ``buckets``, those of the bucket
    height: int  # pixels; frames are scaled to cover height x width and cut around the centre
    width: int
    fps: float  # frames per second that are taken, whatever the file has
    batch: int  # clips of one rank in one batch
    seed: int = 0  # order of clips and start of the excerpt in each
    sample_rate: int = 16000  # Hz
    rank: int = 0
    world: int = 1
    buckets: BucketPlan | None = None  # sizes, lengths and batch sizes by bucket instead of those above
    shuffle: bool = True  # False: the order of the manifest, the same in every epoch
    random_start: bool = True  # False: the excerpt is the beginning of the file
    last: Literal["fill", "drop"] = "fill"  # a bucket's last batches: filled up with clips seen before, or left out
    workers: int = 2  # processes (PyAV) or threads (DALI) that decode
    prefetch: int = 2  # batches made ahead
    timeout: float = 60.0  # seconds for one clip; one that takes longer is skipped
    audio_gap: float = 0.25  # seconds of sound that may be missing from an excerpt; they are silent then
    device: str = "cpu"  # where the batch is wanted; DALI decodes there

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "batch", "sample_rate", "world", "prefetch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} of a feed plan must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            raise UsageError(f"fps of a feed plan must be above 0 and at most 1000, got {self.fps}")
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank {self.rank} of a feed plan must be within 0..{self.world - 1} (world {self.world})")
        if self.timeout <= 0 or self.audio_gap < 0 or self.workers < 0 or self.seed < 0:
            raise UsageError("timeout of a feed plan must be positive; audio_gap, workers and seed at least 0")


class Feeder(Protocol):
    """Batches of one rank, an epoch at a time.

    ``for batch in feeder`` gives the rest of the running epoch; the next loop (`iter`) begins the next one. Every rank
    sees the same number of batches.
    """

    skipped: list[SkippedClip]

    def __iter__(self) -> Iterator[MediaBatch]: ...

    def __next__(self) -> MediaBatch: ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was returned last, as JSON values; batches made ahead do not count."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly there. Raises `UsageError` if the state is of another manifest or plan."""
        ...

    def close(self) -> None:
        """End workers and let go of memory; can be called again."""
        ...
