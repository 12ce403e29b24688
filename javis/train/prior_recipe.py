"""``javis train prior``: stage 2, the HiST-Sypo estimator, as a declarative recipe. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from javis.errors import UsageError
from javis.train.engine_config import EngineConfig, Schedule


@dataclass(frozen=True, kw_only=True)
class PriorRecipe(EngineConfig):
    """Stage 2: the prior estimator, contrastively: text against clips and their asynchronous twins (docs/negatives.md).
    All of the estimator is trained from random weights; encoders and codecs are used as they are.
    """

    out: Path = Path("runs/prior")
    init: str = "demo"
    """Checkpoint whose text encoder and codecs are used: a folder, a hub id, or "demo" (the built-in model)."""
    data: str = "world"
    """Clips: "world" (drawn, rendered and encoded once into OUT/latents), or a manifest (.csv) or shards, decoded on
    the fly."""
    clips: int = 5000
    """Clips of the world."""
    batch: int = 32
    """Clips of each process in a batch; each with seven negatives."""
    processes: int = 1
    """Processes that render clips of the world."""
    feeder: Literal["auto", "dali", "pyav"] = "auto"
    """What decodes the files of a manifest."""
    buckets: str | None = None
    """Sizes of the clips of files, RESOLUTION:FRAMES:PROBABILITY:BATCH,...; by default the checkpoint's own."""
    seconds: float | None = None
    """Length of the clips of a manifest; by default the checkpoint's."""
    resolution: str | None = None
    """Frame size of the clips of a manifest, an official name or WIDTHxHEIGHT; by default the checkpoint's."""
    ratio: str | None = None
    """Height:width of a named size."""
    spatial_tokens: int | None = None
    """Spatial prior tokens; by default 16 for a small checkpoint, else as in --init."""
    temporal_tokens: int | None = None
    """Temporal prior tokens; by default 8 for a small checkpoint, else as in --init."""
    channels: int | None = None
    """Width of the tokens; by default 64 for a small checkpoint, else as in --init."""

    # What tells all kinds apart on the world within minutes.
    steps: int = 900
    learning_rate: float = 2e-3
    warmup: int = 100
    schedule: Schedule = "linear"
    decay: float = 0.4
    weight_decay: float = 0.01
    ema: float = 0.0
    save_every: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_parallel > 1:
            raise UsageError(
                "the estimator of priors has few tokens, which no processes share; use sequence_parallel 1"
            )
        for name in ("clips", "batch", "processes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("spatial_tokens", "temporal_tokens", "channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
