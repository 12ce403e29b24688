"""What a distillation costs, from the FLOPs of the model: recording, and training by each method."""

from __future__ import annotations

from dataclasses import dataclass

from javis.plan import plan
from javis.plan_args import TFLOPS, PlanArgs
from javis.train.distill_config import WITH_GRADIENT, DistillConfig, parse_path

# Evaluations of a model, per sample of training: the student's forward and backward pass count three.
_TRAINING = {"reflow": 3, "guidance": 3 + 2, "shortcut": 3 + 2 + 2}


def _evaluations(config: DistillConfig, parts: int) -> float:
    """Per sample of training. Of dmd: the rollout (backward through its last evaluations), the drafts of a second part
    before it, teacher and critic beside it, the critic's own step, and half a sample of reflow."""
    if config.method != "dmd":
        return _TRAINING[config.method]
    shares = [share / sum(config.path_shares) for share in config.path_shares]
    rollout = 0.0
    for share, path in zip(shares, map(parse_path, config.paths), strict=True):
        counts = [len(part) for part in path][:parts]
        for number, count in enumerate(counts):
            forward = count + sum(counts[:number])
            rollout += share / len(counts) * (forward + 2 * min(count, WITH_GRADIENT))
    return rollout + 2 + 1 + 3 + (1.5 if config.reflow_weight else 0.0)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """PFLOP of the two halves of a distillation, and the hours they take on GPUs that sustain ``tflops``."""

    recording_pflop: float
    training_pflop: float
    tflops: float

    @property
    def hours(self) -> float:
        """GPU hours: of several GPUs together."""
        return (self.recording_pflop + self.training_pflop) * 1e3 / self.tflops / 3600


def estimate(config: DistillConfig, *, model: str = "official", parts: int = 1, tflops: float = TFLOPS) -> Estimate:
    """Count a recipe.

    Args:
        config: of the distillation; ``resolution`` and ``seconds`` say how large a clip is.
        model: as in ``javis plan``; "official" is the full size.
        parts: 2 where the sampler makes the sound first.
        tflops: TFLOP/s of products that a GPU sustains. The default is an assumption (half of the H100's peak in
            bfloat16), not a measurement.

    Returns:
        An `Estimate`. Text, priors and conditioning (once a clip) and optimizer steps are left out.
    """
    facts = plan(
        PlanArgs(
            model=model,
            resolution=config.resolution or "240p",
            seconds=config.seconds or 2.0,
            steps=1,
            guidance=False,
        )
    )
    forward = facts["tflop_per_step"]["total"] / 1e3
    recording = forward * config.clips * parts * config.teacher_steps * 2
    training = forward * config.stage.steps * config.batch * _evaluations(config, parts)
    return Estimate(recording_pflop=recording, training_pflop=training, tflops=tflops)
