"""Buckets: which resolution, how many frames, and how many clips in a batch.

A batch holds clips of one size. A plan lists sizes with a probability and a batch size each, as the official
configuration does (``{"240p": {51: (1.0, 8)}}``); a clip goes to the largest bucket it fits that does not turn it away.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from javis.data.manifest import ClipRow
from javis.data.sizes import RATIO_NAMES, SIZES, image_size, num_pixels
from javis.errors import UsageError
from javis.frame_size import FrameSize, frame_size

ENOUGH_PIXELS = 0.8  # of the bucket's: a clip a little smaller is enlarged (the official tolerance)
_EXPECTED = "RESOLUTION:FRAMES:PROBABILITY:BATCH, such as 240p:51:1.0:8,480p:51:0.5:2"


@dataclass(frozen=True)
class Bucket:
    """Clips of one size.

    Attributes:
        resolution: official name ("240p", whose pictures keep the ratio of the clip as far as the official tables have
            it), or WIDTHxHEIGHT, one size for all.
        num_frames: 1 for pictures.
        probability: with which a clip that fits stays here; otherwise the smaller buckets are tried.
        batch: clips in a batch.

    Raises:
        UsageError: unusable values.
    """

    resolution: str
    num_frames: int
    probability: float
    batch: int

    def __post_init__(self) -> None:
        frame_size(self.resolution, "1:1")
        for name, value in (("frames", self.num_frames), ("batch", self.batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"bucket {self.resolution}: {name} must be a whole number above 0, got {value!r}")
        if not 0 <= self.probability <= 1:
            raise UsageError(f"bucket {self.resolution}: probability must be from 0 to 1, got {self.probability!r}")

    @property
    def pixels(self) -> int:
        """Nominal pixels of a frame."""
        if self.resolution in SIZES:
            return num_pixels(self.resolution)
        height, width = frame_size(self.resolution)
        return height * width

    def size(self, row: ClipRow) -> FrameSize:
        """Height and width that the frames of ``row`` are resized to: the ratio nearest to its own (in log scale)."""
        if self.resolution not in SIZES:
            return frame_size(self.resolution)
        own = math.log(row.height / row.width)
        there = [ratio for ratio, name in RATIO_NAMES.items() if name in SIZES[self.resolution]]

        def distance(ratio: str) -> float:
            height, width = image_size(self.resolution, ratio)
            return abs(math.log(height / width) - own)

        return FrameSize(*image_size(self.resolution, min(there, key=distance)))

    def __str__(self) -> str:
        return f"{self.resolution}:{self.num_frames}:{self.probability:g}:{self.batch}"


@dataclass(frozen=True)
class BucketPlan:
    """Buckets from the largest to the smallest.

    Attributes:
        buckets: sorted by pixels and then by frames, the largest first.
        fps: frames per second at which clips are read; None: at their own. It decides how many frames a clip has.
    """

    buckets: tuple[Bucket, ...]
    fps: float | None = None

    def __post_init__(self) -> None:
        if not self.buckets:
            raise UsageError(f"the plan has no bucket; expected {_EXPECTED}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise UsageError(f"frames per second must be a number above 0, got {self.fps!r}")
        ordered = sorted(self.buckets, key=lambda bucket: (-bucket.pixels, -bucket.num_frames, bucket.resolution))
        keys = [(bucket.resolution, bucket.num_frames) for bucket in ordered]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled:
            raise UsageError(f"the plan has two buckets of {doubled[0]} with {doubled[1]} frames; keep one")
        object.__setattr__(self, "buckets", tuple(ordered))

    @classmethod
    def parse(cls, plan: str | Mapping[str, Any], *, fps: float | None = None) -> BucketPlan:
        """A plan from text, from a mapping, or from a json file (a text that ends with ".json") with the mapping.

        Args:
            plan: ``"240p:51:1.0:8,480p:51:0.5:2"`` (resolution, frames, probability, batch), or the official nesting
                ``{"240p": {51: (1.0, 8)}}``; frames may be text there, for json.
            fps: as the attribute.

        Raises:
            UsageError: something else.
        """
        if isinstance(plan, str) and plan.strip().endswith(".json"):
            try:
                plan = json.loads(Path(plan.strip()).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UsageError(f"cannot read the buckets from {plan}: {error}; expected json") from None
        try:
            if isinstance(plan, str):
                found = [_from_text(part) for part in plan.split(",") if part.strip()]
            else:
                found = [
                    Bucket(str(resolution), int(frames), float(probability), batch)
                    for resolution, lengths in plan.items()
                    for frames, (probability, batch) in lengths.items()
                ]
        except UsageError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"buckets {str(plan)[:100]!r} are unusable ({error}); expected {_EXPECTED}") from None
        return cls(tuple(found), fps)

    def assign(self, row: ClipRow, seed: int) -> Bucket | None:
        """The bucket of a clip: the largest with enough pixels and frames that does not turn it away; None: none.

        A function of ``seed`` and ``row`` alone: neither the order of the manifest nor the process matters. Pass
        another seed in every epoch for another draw.
        """
        fps = self.fps or row.fps
        frames = math.floor(row.num_frames / row.fps * fps + 1e-6)
        for bucket in self.buckets:
            if row.resolution < ENOUGH_PIXELS * bucket.pixels or frames < bucket.num_frames:
                continue
            # A picture has no place among clips, and a clip none among pictures.
            if (row.num_frames == 1) != (bucket.num_frames == 1):
                continue
            if bucket.probability >= 1 or _uniform(seed, row.id, bucket) < bucket.probability:
                return bucket
        return None

    def partition(self, rows: Sequence[ClipRow], seed: int) -> dict[Bucket, list[int]]:
        """Indices of the rows of each bucket, in their order; clips that fit nowhere are in none."""
        places: dict[Bucket, list[int]] = {bucket: [] for bucket in self.buckets}
        for index, row in enumerate(rows):
            bucket = self.assign(row, seed)
            if bucket is not None:
                places[bucket].append(index)
        return places

    def __str__(self) -> str:
        return ",".join(map(str, self.buckets))


def _from_text(text: str) -> Bucket:
    parts = [part.strip() for part in text.split(":")]
    if len(parts) != 4:
        raise UsageError(f"bucket {text.strip()[:60]!r} is unusable; expected {_EXPECTED}")
    try:
        return Bucket(parts[0], int(parts[1]), float(parts[2]), int(parts[3]))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"bucket {text.strip()[:60]!r} is unusable ({error}); expected {_EXPECTED}") from None


def _uniform(seed: int, identity: str, bucket: Bucket) -> float:
    """A number in [0, 1) that looks random and depends on nothing but the arguments."""
    told = f"{seed}\0{identity}\0{bucket.resolution}\0{bucket.num_frames}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") / 2**64
