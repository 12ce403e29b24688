"""What is computed together, and alone for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from javis.flow import timesteps
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.parallel import ParallelJavisDiT
from javis.sample import Guidance, sample
from javis.sample.guidance import GuidancePlan
from tests.model.small import MODES, make_inputs, small_config

# Nothing divides: 5 frames x 6 places of video tokens, 5 x 5 of audio (18 latents in patches of 4, the last one cut).
SIZES = ((5, 4, 6), (18, 5))
Model = JavisDiT | ParallelJavisDiT


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its inputs, and the mesh: ``cfg`` x ``seq`` of the four processes make one clip."""

    cfg: int = 1
    seq: int = 2
    batch: int = 2
    changes: dict[str, Any] = field(default_factory=dict)  # of the model's configuration
    told: dict[str, Any] = field(default_factory=dict)  # further arguments of `condition`
    sizes: tuple[tuple[int, ...], tuple[int, ...]] = SIZES
    masked: bool = False
    sampled: bool = False  # the denoise loop with guidance, not one step
    shard_audio: bool = True
    fused: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    alone: bool = False
    ends: bool = False  # the step's end is an input
    plan: GuidancePlan | None = None

    def model(self) -> JavisDiT:
        model = JavisDiT(small_config(**self.changes), ModelOps.fused() if self.fused else None).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model.to(self.dtype)

    def masks(self) -> dict[str, Tensor]:
        """Shares of noise per latent frame, as the sampler takes them: given, generated, edited from half."""
        g = torch.Generator().manual_seed(9)
        lengths = {"video_mask": self.sizes[0][0], "audio_mask": self.sizes[1][0]}
        choices = torch.tensor([0.0, 1.0, 0.5]) if self.sampled else torch.tensor([0.0, 1.0])
        batch = self.batch // 2 if self.sampled else self.batch
        return {
            name: choices[torch.randint(len(choices), (batch, length), generator=g)].to(self.dtype)
            for name, length in lengths.items()
        }

    def inputs(self, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
        noisy, told = make_inputs(small_config(**self.changes), self.batch, self.sizes, seed)
        if self.ends:  # another one for each sample
            noisy["end"] = noisy["timestep"] * torch.linspace(0.2, 0.8, self.batch)
        return {name: value.to(self.dtype) for name, value in noisy.items()}, told

    def run(self, model: Model) -> tuple[Tensor, Tensor]:
        noisy, told = self.inputs()
        with torch.no_grad():
            condition = model.condition(**told, **self.told)
        masks = self.masks() if self.masked else {}
        if not self.sampled:
            masks = {name: mask == 1 for name, mask in masks.items()}
            with torch.no_grad():
                return tuple(model.denoise(**noisy, condition=condition, **masks))  # type: ignore[return-value]
        clips = self.batch // 2
        noise = torch.Generator().manual_seed(3)
        draw: Callable[[Tensor], Tensor] = lambda x: torch.randn(x.shape, generator=noise, dtype=x.dtype)  # noqa: E731
        return sample(
            model,  # type: ignore[arg-type]
            noisy["video"][:clips],
            noisy["audio"][:clips],
            condition,
            timesteps(3).to(self.dtype),
            guidance=Guidance(3.0, 2.0),
            draw_noise=draw,
            plan=self.plan,
            **masks,
        )


CASES: dict[str, Case] = {
    **{f"{mode} {seq}": Case(seq=seq, changes={"prior_mode": mode}) for mode in MODES for seq in (2, 4)},
    **{f"{mode} masked": Case(seq=4, changes={"prior_mode": mode}, masked=True) for mode in MODES},
    "masked 2": Case(seq=2, masked=True),
    "float32 2": Case(seq=2, dtype=torch.float32, tolerance=1e-5, alone=True),
    "float32 4": Case(seq=4, dtype=torch.float32, tolerance=1e-5, masked=True, alone=True),
    "bfloat16": Case(seq=2, dtype=torch.bfloat16, masked=True),  # against the error of bfloat16 in one process
    "fused 2": Case(seq=2, dtype=torch.float32, tolerance=1e-5, fused=True, alone=True),
    "fused 4": Case(seq=4, dtype=torch.float32, tolerance=1e-5, fused=True, masked=True),
    "whole audio 2": Case(seq=2, shard_audio=False, masked=True, alone=True),
    "whole audio 4": Case(seq=4, shard_audio=False, sizes=((5, 4, 6), (6, 2))),  # less audio than ranks
    "no prior": Case(seq=4, changes={"use_prior": False}),
    "prior left out": Case(told={"with_prior": False, "with_bidirectional": False}),
    "no bidirectional": Case(changes={"use_bidirectional": False}),
    "union of priors": Case(cfg=2, seq=2, told={"prior_scope": "batch"}),
    "clock": Case(seq=4, changes={"clock": True, "clock_attention": True}),
    "sample prediction": Case(seq=2, changes={"prediction": "sample", "sigma_data": 0.5}),
    "patches of time": Case(seq=4, changes={"video_patch": (2, 2, 2)}, sizes=((9, 4, 6), (18, 5)), masked=True),
    "cfg": Case(cfg=2, seq=1, sampled=True),
    "cfg of three": Case(cfg=2, seq=1, batch=3),  # halves of unequal size
    "cfg and seq": Case(cfg=2, seq=2, sampled=True, batch=4),
    "cfg and seq masked": Case(cfg=2, seq=2, sampled=True, masked=True),
    # Steps of one sample between those of two: outside of the interval, and where the other half is used again.
    "guided now and then": Case(cfg=2, seq=2, sampled=True, plan=GuidancePlan(interval=(0, 800))),
    "half used again": Case(cfg=2, seq=1, sampled=True, plan=GuidancePlan(every=2)),
    "end of the step": Case(cfg=2, seq=2, changes={"step_input": True}, ends=True),
    "sampled 4": Case(seq=4, sampled=True, masked=True),
}

SEEDS = (0, 1)  # of the inputs of two clips made in turn
REFUSED: dict[str, Case] = {
    "too few frames": Case(seq=4, sizes=((3, 4, 6), (18, 5))),
    "too few places": Case(seq=4, sizes=((5, 2, 6), (18, 5))),
    "too little audio": Case(seq=4, sizes=((5, 4, 6), (12, 5))),
    "one sample": Case(cfg=2, seq=1, batch=1),
}
