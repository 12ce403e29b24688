"""Recipes of distillation: from a guided many-step teacher to a student of a few unguided steps.

The defaults are the recipe of the built-in model. Of the full size (docs/distillation.md): ``--teacher DIR --captions
FILE --device cuda --resolution 240p --clips 20000 --teacher-steps 32 --windows 8 4 2``; with ``--dry-run`` it runs once
with toy components and says what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from javis.errors import UsageError
from javis.train.config import StageConfig

Method = Literal["guidance", "reflow", "shortcut", "dmd"]
WITH_GRADIENT = 2  # last evaluations of a rollout through which the gradient of distribution matching goes
FOUR_STEPS = "1000,900,750/947.37"
EIGHT_STEPS = "1000,980,947.37,900,750/947.37,900,750"


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distil a checkpoint: record what its sampler does, then teach a student to do it in fewer evaluations."""

    teacher: str = "demo"
    """Folder or hub id of a checkpoint, or "demo", the built-in model."""
    out: Path = Path("runs/distill")
    """Everything the run writes. A killed run goes on where it stopped."""
    method: Method = "reflow"
    """guidance: guided velocity in one evaluation; reflow: piecewise rectified flow; shortcut: self-consistency;
    dmd: distribution matching of whole rollouts, from a student of one of the others (--init)."""
    init: Path | None = None
    """Folder of a finished student to begin with, such as runs/distill/reflow (default: the teacher)."""
    captions: Path | None = None
    """Text file, one caption a line (default: captions of the built-in world)."""
    resolution: str | None = None
    """Size of the clips (default: the checkpoint's; the built-in model has one)."""
    seconds: float | None = None
    """Their length (default: the checkpoint's)."""
    dry_run: bool = False
    """Run the whole recipe once with random weights of toy size, and say what it costs at full size."""
    clips: int = 2400
    """Clips whose way through the teacher's sampler is recorded."""
    held_out: int = 32
    """Of them, the last ones are kept for validation."""
    teacher_steps: int = 8
    """Evaluations of the teacher in each part of the sampling; a multiple of the largest of --windows."""
    windows: tuple[int, ...] = (4, 2, 1)
    """Steps in which the student must be able to make a part: 2 for a clip of 4 steps with the sound first."""
    window_shares: tuple[float, ...] = (0.35, 0.5, 0.15)
    """How often each of --windows is trained."""
    train_prior_attention: bool = False
    """Train the attention to the priors, too; else it stays the teacher's. That of a student drifts without use, and
    costs events in step (docs/distillation.md)."""
    paths: tuple[str, ...] = (FOUR_STEPS, EIGHT_STEPS)
    """dmd: timesteps of the student's evaluations, parts of a clip separated by "/"; they go into its settings."""
    path_shares: tuple[float, ...] = (0.6, 0.4)
    """How often each of --paths is trained."""
    matching_guidance: tuple[float, float] = (0.5, 0.4)
    """dmd: share of the teacher's guidance, of picture and sound, in what clips are matched to: 0 none, 1 all of it.
    Matching sharpens by itself; with all of it clips become more alike than the teacher's."""
    matching_ratio: float | None = None
    """dmd: shift towards noise of the timesteps at which clips are compared (default: of the recorded ones). A smaller
    one asks more of details, such as the moment within a frame."""
    critic_rate: float = 3.0
    """dmd: learning rate of the critic, as a multiple of the student's."""
    critic_warmup: int = 60
    """Steps in which the critic alone learns, first; not where --init is of this method: its critic goes on."""
    reflow_weight: float = 0.5
    """dmd: weight of the reflow loss beside it, on half as many clips."""
    guidance: tuple[float, float] = (2.5, 2.5)
    """Range of the teacher's guidance of the picture; the student takes the scale as input."""
    audio_guidance: tuple[float, float] = (4.0, 4.0)
    """The same of the sound."""
    timestep_ratio: float | None = None
    """Shift of the timesteps towards noise (default: the teacher's)."""
    batch: int = 16
    """Clips a step, over all processes."""
    processes: int = 2
    """Workers of one thread each on a CPU; one on a GPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the student is trained."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of matrix products in training."""
    stage: StageConfig = field(
        default_factory=lambda: StageConfig(steps=2400, learning_rate=5e-4, warmup=100, decay=0.6)
    )
    """Steps and learning rate."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Of the layers' matrices; everything else follows AdamW."""
    muon_rate: float = 2.0
    """Learning rate of those matrices, as a multiple."""
    weight_decay: float = 0.01
    clip_gradient: float = 1.0
    ema: float = 0.995
    """Decay of the averaged weights, which are the student (and the shortcut's target)."""
    compile: bool = False
    """torch.compile the loss; minutes of compilation, then faster steps; needs a C++ compiler."""
    seed: int = 0
    save_every: int = 200
    log_every: int = 20

    def __post_init__(self) -> None:
        if not self.windows or min(self.windows) < 1 or any(self.teacher_steps % n for n in self.windows):
            raise UsageError(f"windows {self.windows} must divide the teacher's steps, {self.teacher_steps}")
        if len(self.window_shares) != len(self.windows) or min(self.window_shares) < 0 or sum(self.window_shares) <= 0:
            raise UsageError(f"window_shares needs {len(self.windows)} shares that are not negative")
        if self.method == "shortcut" and sorted(self.windows) != [1 << i for i in range(len(self.windows))]:
            raise UsageError(f"the shortcut halves its steps: windows must be 1, 2, 4, ..., got {self.windows}")
        for path in self.paths:
            parse_path(path)
        if len(self.path_shares) != len(self.paths) or min(self.path_shares) < 0 or sum(self.path_shares) <= 0:
            raise UsageError(f"path_shares needs {len(self.paths)} shares that are not negative")
        for name, (low, high) in (("guidance", self.guidance), ("audio_guidance", self.audio_guidance)):
            if not 0 <= low <= high <= 100:
                raise UsageError(f"{name} must be a range within 0..100, got {low} {high}")
        if not all(0 <= share <= 1 for share in self.matching_guidance):
            low, high = self.matching_guidance
            raise UsageError(f"matching_guidance must be two shares from 0 to 1, got {low} {high}")
        if self.matching_ratio is not None and not 0.01 <= self.matching_ratio <= 100:
            raise UsageError(f"matching_ratio must be a number from 0.01 to 100, got {self.matching_ratio}")
        if not 0 < self.held_out < self.clips:
            raise UsageError(f"held_out must be between 1 and clips - 1 = {self.clips - 1}, got {self.held_out}")
        if self.processes < 1 or self.batch % self.processes:
            raise UsageError(f"batch {self.batch} must be a multiple of processes {self.processes}")

        for name, value in (("critic_rate", self.critic_rate), ("reflow_weight", self.reflow_weight)):
            if not 0 <= value <= 1000:
                raise UsageError(f"{name} must be a number from 0 to 1000, got {value}")

    @property
    def states(self) -> int:
        """States of a part that are recorded: at both ends of the shortest windows."""
        return max(self.windows) + 1


def parse_path(text: str) -> list[list[float]]:
    """Timesteps of each part of a clip from text such as "1000,900,750/947.37".

    Raises:
        UsageError: not one or two lists of timesteps that decrease and stay above 0, the first from 1000.
    """
    try:
        parts = [[float(t) for t in part.split(",")] for part in text.split("/")]
    except ValueError:
        parts = []
    falling = all(a > b > 0 for part in parts for a, b in pairwise(part)) and all(part[-1] > 0 for part in parts)
    if len(parts) not in (1, 2) or not falling or parts[0][0] != 1000 or parts[-1][0] > 1000:
        raise UsageError(
            "a path is a list of timesteps for each part, such as 1000,900,750/947.37: decreasing, above 0, the first "
            f"list from 1000; got {text!r}"
        )
    return parts
