"""The denoise loop: a solution of the rectified flow with classifier-free guidance and condition masks.

Euler's steps unless told otherwise: solvers.py. When there is guidance: guidance.py. What a step does to the latents:
updates.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from javis.flow import NUM_TIMESTEPS, _spread, add_noise
from javis.model.dit import Conditioning, Velocity
from javis.sample.guidance import Guidance, GuidancePlan, Guide
from javis.sample.updates import EulerUpdate, SolverUpdate, Streams, Update

StepEnd = Callable[[int, float, Tensor, Tensor], "tuple[Tensor, Tensor] | None"]


class Denoiser(Protocol):
    """What predicts velocities: a `JavisDiT`, or what stands in for it (:mod:`javis.sample.graph`)."""

    def denoise(
        self,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        condition: Conditioning,
        *,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
    ) -> Velocity:
        """See :meth:`javis.model.dit.JavisDiT.denoise`.

        A model whose ``config.step_input`` is set also takes ``end`` [B], the timestep at which the step ends.
        """
        ...


@dataclass
class Tally:
    """What a solution has cost. ``forwards``: of the model, per clip; an evaluation with both halves is two."""

    forwards: int = 0


class Step(NamedTuple):
    """What a callback sees before the update of a step. Latents are those held by the sampler."""

    number: int
    timestep: float
    video: Tensor
    audio: Tensor
    video_input: Tensor
    audio_input: Tensor
    video_mask: Tensor | None
    audio_mask: Tensor | None
    predicted: Velocity


def _masked_input(z: Tensor, mask: Tensor, active: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Model input and frames active at ``t``: those that become active now get noise, in the model's input only."""
    now = mask * NUM_TIMESTEPS >= t[:, None]
    starting = now & ~active
    return torch.where(_spread(starting, z), add_noise(z, noise, t), z), now


@torch.no_grad()
def sample(
    model: Denoiser,
    video: Tensor,
    audio: Tensor,
    condition: Conditioning,
    timesteps: Tensor,
    *,
    guidance: Guidance | float = 1.0,
    video_mask: Tensor | None = None,
    audio_mask: Tensor | None = None,
    draw_noise: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[Step], None] | None = None,
    on_step_end: StepEnd | None = None,
    solver: str = "euler",
    evaluations: int | None = None,
    held: tuple[Sequence[int], Sequence[int]] | None = None,
    plan: GuidancePlan | None = None,
    tally: Tally | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrate from noise to latents.

    Args:
        model: the velocity model.
        video, audio: starting latents [B, Cv, T, H, W] and [B, Ca, Ta, M]; pure noise, or with masks the given latents
            where the mask is 0.
        condition: conditioning of the B prompts; with guidance of 2B samples, the unconditional ones last.
        timesteps: decreasing, [intervals]; the last interval ends at 0.
        guidance: one scale or one per modality.
        video_mask, audio_mask: float [B, T], [B, Ta]: 0 = given, 1 = generate, between = edit from that share of noise.
            If one is given, the other defaults to all ones.
        draw_noise: makes the noise for frames that become active, called with the latents once per interval and
            modality, video first; default is ``torch.randn_like``.
        callback: sees every evaluation before its update.
        on_step_end: called after every update with (number, timestep, video, audio); what it returns, if anything, goes
            on in place of the latents. Must keep their shapes. A multistep solver then begins anew.
        solver: how an interval is crossed (:mod:`javis.sample.solvers`).
        evaluations: of the model in all; None: what the solver takes for these intervals.
        held: numbers of the intervals at which video and audio, each, take a velocity; between them a stream goes on in
            a straight line (:class:`javis.sample.updates.Held`). None: at all. Not with masks.
        plan: when there is guidance, and rescaling.
        tally: counts the forwards of the model.

    Returns:
        Final latents of video and audio.

    Raises:
        ValueError: conditioning, timesteps or options that do not fit together.
    """
    scales = guidance if isinstance(guidance, Guidance) else Guidance(guidance, guidance)
    batch = video.shape[0]
    guided = condition.fps.shape[0] == 2 * batch
    if condition.fps.shape[0] not in (batch, 2 * batch):
        raise ValueError(
            f"conditioning is for {condition.fps.shape[0]} samples, expected {batch} or, guided, {2 * batch}"
        )
    if not guided and (scales.video != 1 or scales.audio != 1):
        raise ValueError(f"guidance {tuple(scales)} needs the unconditional samples in the conditioning (2B samples)")
    draw_noise = draw_noise or torch.randn_like
    masked = video_mask is not None or audio_mask is not None
    if masked and held is not None:
        raise ValueError("streams with steps of their own cannot be combined with condition masks")
    exact = solver == "euler" and held is None
    takes_end = bool(getattr(getattr(model, "config", None), "step_input", False))
    if takes_end and not exact:
        raise ValueError(
            "this model predicts the velocity of a whole step (step_input), which solver 'euler' alone can use, with "
            f"both streams at once; got {solver!r}"
        )
    update: Update = EulerUpdate(timesteps) if exact else SolverUpdate(solver, timesteps, evaluations, held)
    if exact and evaluations not in (None, len(timesteps)):
        raise ValueError(f"{evaluations} evaluations do not fit {len(timesteps)} intervals of 'euler'")
    guide = Guide(model, condition, scales, plan or GuidancePlan(), batch)
    on = new = Streams(None, None)
    if masked:
        video_mask = video.new_ones(batch, video.shape[2]) if video_mask is None else video_mask
        audio_mask = audio.new_ones(batch, audio.shape[2]) if audio_mask is None else audio_mask
        on = Streams(video_mask == 1, audio_mask == 1)
    for i, (now, after, first) in enumerate(update.points):
        t = now.to(video).expand(batch)
        video_in, audio_in, changed = video, audio, False
        # Of an interval with two evaluations the second sees the frames of the first.
        if first and video_mask is not None and audio_mask is not None:
            before = on
            assert before.video is not None and before.audio is not None
            video_in, v_on = _masked_input(video, video_mask, before.video, t, draw_noise(video))
            audio_in, a_on = _masked_input(audio, audio_mask, before.audio, t, draw_noise(audio))
            on, new = Streams(v_on, a_on), Streams(v_on & ~before.video, a_on & ~before.audio)
            changed = guide.reuses and bool(torch.cat((v_on != before.video, a_on != before.audio), 1).any())
        out, left = guide.predict(
            video_in, audio_in, t, video_mask=on.video, audio_mask=on.audio,
            end=after.to(video).expand(batch) if takes_end else None,
            time=float(now) if guide.plan.interval is not None else None, changed=changed,
        )  # fmt: skip
        if callback is not None:
            callback(Step(i, float(now), video, audio, video_in, audio_in, on.video, on.audio, out))
        video, audio = update(i, video, audio, out, left, on, new)
        if on_step_end is not None and (replaced := on_step_end(i, float(now), video, audio)) is not None:
            v, a = _replaced(video, replaced[0]), _replaced(audio, replaced[1])
            if v is not video or a is not audio:
                update.moved(v - video, a - audio)
            video, audio = v, a
    if tally is not None:
        tally.forwards += guide.forwards
    return video, audio


def _replaced(old: Tensor, new: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise ValueError(f"on_step_end gave latents {list(new.shape)} in place of {list(old.shape)}")
    return new.to(old)
