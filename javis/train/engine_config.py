"""What the training engine is told. Loads no torch, so that recipes can put it into their command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from javis.errors import UsageError

Optimizer = Literal["adamw", "apex", "te"]
Precision = Literal["fp32", "autocast", "bf16", "fp8", "fp8-te"]
Schedule = Literal["constant", "linear", "cosine"]
Checkpointing = Literal["none", "selective", "full"]
Sharding = Literal["auto", "none", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a task is trained, whatever it is. docs/training.md, "Engine" and "Nothing lost"."""

    out: Path = Path("runs/train")
    """Everything the run writes. A killed run goes on where its last checkpoint is."""
    steps: int = 1000
    """Steps of the optimizer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""
    seed: int = 0
    """Of the generators of python, numpy and torch; share r of the data has seed + r."""
    accumulation: int = 1
    """Batches of each process in a step."""
    optimizer: Optimizer = "adamw"
    """torch's fused AdamW, or the fused Adam of NVIDIA apex or of Transformer Engine, which must be installed."""
    learning_rate: float = 1e-4
    """After the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's moments."""
    weight_decay: float = 0.0
    """Of weights with more than one dimension; biases and norms have none."""
    warmup: int = 0
    """Steps over which the rate rises linearly."""
    schedule: Schedule = "constant"
    """What the rate does over the last steps (--decay): stay, fall linearly to zero, or as half a cosine."""
    decay: float = 1.0
    """Share of the steps, at the end, over which the rate falls."""
    clip_gradient: float = 1.0
    """Largest norm of all gradients together; 0: no limit."""
    ema: float = 0.999
    """Decay of the averaged weights; 0: none are kept."""
    precision: Precision = "fp32"
    """bf16: weights in float32, computed with in bfloat16; autocast: torch chooses per operation; fp8, fp8-te: as bf16,
    and the large linear layers in FP8."""
    activation_checkpointing: Checkpointing = "none"
    """Activations computed again in the backward pass: full: all of a block's; selective: all but matrix products."""
    sharding: Sharding = "auto"
    """fsdp: weights, gradients, moments and averages divided over the processes; auto: where there are several
    processes, or the precision is bf16 or fp8."""
    replicas: int = 1
    """Groups of processes, each of which holds all weights (hybrid sharding); 1: all processes share one copy."""
    sequence_parallel: int = 1
    """Processes that share the tokens of the same clips, for clips whose activations are too many for one GPU; divides
    the number of processes. The stages audio and joint."""
    save_every: int = 500
    """Steps between checkpoints; there is one at the end, too. 0: at the end only."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    async_save: bool = True
    """Write a checkpoint while training goes on; it costs a copy of what is saved in host memory."""
    log_every: int = 20
    """Steps of which the log holds the mean."""
    sample_every: int = 0
    """Steps between samples, for recipes that make them; 0: none."""
    max_nonfinite: int = 10
    """So many steps in a row with a loss or gradient that is not finite end the run."""

    def __post_init__(self) -> None:
        positive = ("steps", "accumulation", "keep", "log_every", "max_nonfinite", "replicas", "sequence_parallel")
        for name in positive:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "save_every", "sample_every", "clip_gradient", "weight_decay", "learning_rate"):
            if not getattr(self, name) >= 0:  # NaN, too
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("ema", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.replicas > 1 and self.sharding == "none":
            raise UsageError("replicas divide the processes of sharded training; use --sharding fsdp or --replicas 1")


__all__ = ["Checkpointing", "EngineConfig", "Optimizer", "Precision", "Schedule", "Sharding"]
