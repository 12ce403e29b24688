"""Classifier-free guidance: two halves of a batch, when both are evaluated, and how they become one velocity.

    v = c + (scale - 1) * (c - u)          c, u: velocity with and without the condition

- In an interval of timesteps only (Kynkaanniemi et al., arXiv 2404.07724); outside it the model sees c alone: half the
  work.
- The unconditional half in every n-th guided evaluation only. Between them the difference ``c - u`` of the last full
  one is used with the fresh c. Holding u instead would add ``(scale - 1)`` times what c has changed since.
- Rescaled (Lin et al., arXiv 2305.08891, eq. 14-16): the guided velocity gets the standard deviation of c, per sample
  and modality over the frames that move, and is mixed with the one that was not rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from javis.flow import _spread
from javis.model.dit import Conditioning, LayerCondition, Velocity


class Guidance(NamedTuple):
    """Guidance scales per modality; ``v = v_uncond + scale * (v_cond - v_uncond)``. Scale 1 is no guidance."""

    video: float
    audio: float


@dataclass(frozen=True)
class GuidancePlan:
    """When and how there is guidance; the default is the plain one, in every evaluation.

    Attributes:
        interval: (low, high): timesteps, both included, with guidance; None: all.
        rescale: share phi of the rescaled velocity, 0..1.
        every: evaluate the unconditional half in every n-th guided evaluation; 1: in all.
    """

    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1000:
            raise ValueError(f"the guidance interval must be LOW < HIGH in 0..1000, got {self.interval}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale must be in 0..1, got {self.rescale}")
        if self.every < 1:
            raise ValueError(f"the unconditional half must be evaluated every n >= 1 evaluations, got {self.every}")

    def guides(self, t: float) -> bool:
        """Whether there is guidance at timestep t."""
        return self.interval is None or self.interval[0] <= t <= self.interval[1]


def combine(
    velocity: Tensor, scale: float, batch: int, channels: int, rescale: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Velocity [2B, C, T, ...], conditional half first -> guided [B, channels, T, ...], in float32 or wider.

    Args:
        mask: bool [B, T], frames that move; the standard deviations of ``rescale`` are theirs.
    """
    v = velocity[:, :channels].to(torch.promote_types(velocity.dtype, torch.float32))
    if len(v) == batch:
        return v
    conditional, unconditional = v.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    return rescaled(guided, conditional, rescale, mask) if rescale else guided


def rescaled(guided: Tensor, conditional: Tensor, share: float, mask: Tensor | None = None) -> Tensor:
    """``share * guided * std(conditional) / std(guided) + (1 - share) * guided``, standard deviations per sample."""
    factor = _std(conditional, mask) / _std(guided, mask).clamp(min=torch.finfo(guided.dtype).tiny)
    if mask is not None:
        factor = torch.where(mask.any(1), factor, 1)  # nothing moves: no standard deviation
    return _spread(share * factor + (1 - share), guided) * guided


def _std(x: Tensor, mask: Tensor | None) -> Tensor:
    """Standard deviation per sample [B], over the frames of a mask [B, T]."""
    if mask is None:
        return x.flatten(1).std(1)
    weight = _spread(mask, x).to(x.dtype).expand_as(x).flatten(1)
    count, x = weight.sum(1), x.flatten(1)
    mean = (x * weight).sum(1) / count
    return (((x - mean[:, None]).square() * weight).sum(1) / (count - 1)).sqrt()


def conditional_half(condition: Conditioning) -> Conditioning:
    """Conditioning of the first half of the samples: views, nothing is copied."""
    batch = len(condition.fps) // 2

    def rows(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:batch]
        return type(value)(*map(rows, value)) if hasattr(value, "_fields") else tuple(map(rows, value))

    layers = [LayerCondition._make(None if part is None else rows(part) for part in told) for told in condition.layers]
    return replace(
        condition,
        layers=layers,
        text_mask=None if condition.text_mask is None else condition.text_mask[:batch],
        audio_text_mask=None if condition.audio_text_mask is None else condition.audio_text_mask[:batch],
        fps=condition.fps[:batch],
        video_positions=condition.video_positions[:batch],
    )


class Guide:
    """Evaluates a model with guidance, and keeps what is used again. One for each solution.

    Args:
        model: has ``denoise``, as :class:`javis.model.dit.JavisDiT`.
        condition: of B samples, or 2B with the unconditional ones last.
        scales, plan: how much guidance, and when.
        batch: B.

    Attributes:
        forwards: forwards of the model per clip so far: an evaluation with both halves is two.
    """

    def __init__(self, model: Any, condition: Conditioning, scales: Guidance, plan: GuidancePlan, batch: int) -> None:
        self.model, self.condition, self.scales, self.plan, self.batch = model, condition, scales, plan, batch
        self.guided = condition.fps.shape[0] == 2 * batch
        self.forwards = 0
        self._half: Conditioning | None = None
        self._count = 0
        self._difference: Velocity | None = None

    @property
    def reuses(self) -> bool:
        """Whether an evaluation may depend on an earlier one."""
        return self.guided and self.plan.every > 1

    def predict(
        self,
        video: Tensor,
        audio: Tensor,
        t: Tensor,
        *,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        end: Tensor | None = None,
        time: float | None = None,
        changed: bool = False,
    ) -> tuple[Velocity, Guidance]:
        """A velocity, and the scales with which its halves are to be combined (1: there is one half).

        Args:
            video, audio, t, masks: as for ``denoise``, of B samples. end: [B], for models that take it.
            time: the timestep as a number, for a plan with an interval (``t`` may be on a device).
            changed: other frames move than in the last evaluation, so that nothing of it is used again.
        """
        whole = Guidance(1, 1)
        if not self.guided or (time is not None and not self.plan.guides(time)):
            return self._evaluate(video, audio, t, video_mask, audio_mask, end, False), whole
        if changed:
            self._count, self._difference = 0, None
        full, self._count = self._count % self.plan.every == 0, self._count + 1
        out = self._evaluate(video, audio, t, video_mask, audio_mask, end, full)
        if not full:
            assert self._difference is not None
            out = Velocity(*(torch.cat((c, c.to(d) - d)) for c, d in zip(out, self._difference, strict=True)))
        elif self.plan.every > 1:
            self._difference = Velocity(*(_difference(part) for part in out))
        if not self.plan.rescale:
            return out, self.scales
        return Velocity(
            combine(out.video, self.scales.video, self.batch, video.shape[1], self.plan.rescale, video_mask),
            combine(out.audio, self.scales.audio, self.batch, audio.shape[1], self.plan.rescale, audio_mask),
        ), whole

    def _evaluate(
        self,
        video: Tensor,
        audio: Tensor,
        t: Tensor,
        video_mask: Tensor | None,
        audio_mask: Tensor | None,
        end: Tensor | None,
        both: bool,
    ) -> Velocity:
        """The conditional half, or both, conditional one first."""
        self.forwards += 2 if both else 1
        condition = self.condition
        if both:
            video, audio, t = torch.cat((video, video)), torch.cat((audio, audio)), torch.cat((t, t))
            if video_mask is not None and audio_mask is not None:
                video_mask, audio_mask = torch.cat((video_mask, video_mask)), torch.cat((audio_mask, audio_mask))
            end = None if end is None else torch.cat((end, end))
        elif self.guided:
            if self._half is None:
                self._half = conditional_half(condition)
            condition = self._half
        more = {} if end is None else {"end": end}
        return self.model.denoise(video, audio, t, condition, video_mask=video_mask, audio_mask=audio_mask, **more)


def _difference(both: Tensor) -> Tensor:
    conditional, unconditional = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2)
    return conditional - unconditional
