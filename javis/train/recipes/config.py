"""Recipes: what a stage trains, on what, from which weights. Loads no torch.

The defaults are those of the official configurations of stages 1 and 3 (learning rate, warm-up, clipping, average,
condition masks), except where a comment says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from javis.errors import UsageError
from javis.train.engine_config import EngineConfig

# Kind of condition mask -> share of the samples (javis/train/recipes/masks.py says what each gives).
OFFICIAL_SHARES: dict[str, float] = {
    "random": 0.01,
    "video_to_audio": 0.05,
    "audio_to_video": 0.05,
    "sound_image_animate": 0.03,
    "interpolate": 0.03,
    "quarter_random": 0.005,
    "quarter_head": 0.05,
    "quarter_tail": 0.005,
    "quarter_head_tail": 0.005,
    "image_random": 0.005,
    "image_head": 0.05,
    "image_tail": 0.005,
    "image_head_tail": 0.005,
}


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What is drawn for every sample of a step."""

    logit_std: float = 1.0
    """Deviation of the logit-normal timesteps (their median is 500 before the shift)."""
    shift: float | None = None
    """Shift of the timesteps towards noise; by default that with which the checkpoint samples, if it has one, else that
    of frame size and duration (SD 3, eq. 23)."""
    drop_text: float = 0.1
    """Share of samples that are trained with the null caption, for classifier-free guidance."""
    drop_prior: float = 0.1
    """Share of samples that are trained with the null prior."""
    drop: Literal["together", "independent"] = "together"
    """Whether caption and prior are dropped together, as sampling asks for them, or each for itself, the captions of
    picture and sound too (as the official code does)."""
    masks: Mapping[str, float] = field(default_factory=lambda: dict(OFFICIAL_SHARES))
    """Share of each kind of condition mask (joint stage); the rest is generated whole."""


@dataclass(frozen=True, kw_only=True)
class FlowRecipe(EngineConfig):
    """What the stages audio and joint have in common."""

    init: str = "demo"
    """Checkpoint whose encoders and codecs are used and whose weights the stage starts from: a folder (of the stage
    before), a hub id, "demo" (the built-in model), or "toy" (small random components of the full-size pipeline)."""
    fresh: bool = False
    """Begin with a transformer of random weights instead of that of --init."""
    weights: tuple[Path, ...] = ()
    """Weight files that replace those of the transformer where names and shapes agree, in this order; official names
    of JavisDiT and of Open-Sora's STDiT3, or ours."""
    data: str = "world"
    """Clips: a manifest (.csv), a folder or URL of shards or of what "javis data encode" wrote, or "world" (drawn on
    the fly)."""
    feeder: Literal["auto", "dali", "pyav"] = "auto"
    """What decodes the files of a manifest."""
    buckets: str | None = None
    """Sizes of the clips of a manifest, RESOLUTION:FRAMES:PROBABILITY:BATCH,...; by default the checkpoint's own."""
    batch: int = 4
    """Clips of each process in a batch."""
    seconds: float | None = None
    """Length of the clips; by default the checkpoint's."""
    resolution: str | None = None
    """Frame size, an official name or WIDTHxHEIGHT; by default the checkpoint's."""
    ratio: str | None = None
    """Height:width of a named size."""
    train: Literal["official", "all"] = "official"
    """official: what the paper's stage trains, the rest is frozen; all: whatever takes part in the stage."""
    draws: Draws = field(default_factory=Draws)
    """Timesteps, dropped conditions, condition masks."""
    prompts: tuple[str, ...] = ()
    """What is sampled every --sample-every steps; by default two captions of the data."""
    sample_steps: int | None = None
    """Denoising steps of these samples; by default the checkpoint's."""
    tensorboard: bool = True
    """Write events for TensorBoard into OUT/tensorboard."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well; needs the package wandb."""
    dry_run: bool = False
    """Say what the stage would train, its memory and its time per step (predicted), and stop."""
    gpu_memory: float = 80.0
    """GB of the card that a dry run compares with."""
    json: bool = False
    """Print the dry run as JSON."""

    # The official values where they differ from the engine's.
    learning_rate: float = 1e-4
    warmup: int = 1000
    clip_gradient: float = 1.0
    ema: float = 0.99
    save_every: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise UsageError(f"batch must be at least 1, got {self.batch}")
        if self.wandb is not None and not self.wandb:
            raise UsageError("--wandb needs the name of a project")
        d = self.draws
        for name, value in (("drop-text", d.drop_text), ("drop-prior", d.drop_prior)):
            if not 0 <= value <= 1:
                raise UsageError(f"draws.{name} must lie between 0 and 1, got {value}")
        if not d.logit_std >= 0 or (d.shift is not None and not d.shift > 0):
            raise UsageError(f"draws: logit-std {d.logit_std} must not be negative, shift {d.shift} must be positive")
        check_shares(d.masks)

    @property
    def stage(self) -> Literal["audio", "joint"]:
        """Name of the stage."""
        raise NotImplementedError  # the recipes below say theirs; this one is their common part

    def resolved(self) -> dict[str, Any]:
        """Everything that was asked for, json-able, for ``config.json`` beside the checkpoints."""
        return {"stage": self.stage} | _plain(dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class AudioRecipe(FlowRecipe):
    """Stage 1: the audio branch alone, started from the video branch's weights; loss: the velocity of the sound."""

    out: Path = Path("runs/audio")
    audio_from: Literal["video", "checkpoint"] = "video"
    """Start the audio branch from the video branch's weights where shapes agree (the paper), or go on with its own."""

    @property
    def stage(self) -> Literal["audio", "joint"]:
        return "audio"


@dataclass(frozen=True, kw_only=True)
class JointRecipe(FlowRecipe):
    """Stage 3: what joins the branches, with the prior estimator of stage 2 frozen; loss: both velocities."""

    out: Path = Path("runs/joint")

    @property
    def stage(self) -> Literal["audio", "joint"]:
        return "joint"


def check_shares(shares: Mapping[str, float]) -> None:
    """Raise `UsageError` unless these are kinds of condition masks with shares that add up to at most 1."""
    unknown = sorted(set(shares) - set(OFFICIAL_SHARES))
    if unknown:
        raise UsageError(f"unknown condition masks {unknown}; expected some of {list(OFFICIAL_SHARES)}")
    if not all(0 <= share <= 1 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise UsageError(f"shares of condition masks must be from 0 to 1, together at most 1, got {dict(shares)}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value
