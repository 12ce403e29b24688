"""The denoise loop: Euler steps along the rectified flow with classifier-free guidance and condition masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from javis.flow import NUM_TIMESTEPS, _spread, add_noise
from javis.kernels.ops.flow_update.api import flow_update
from javis.model.dit import Conditioning, Velocity


class Guidance(NamedTuple):
    """Guidance scales per modality; ``v = v_uncond + scale * (v_cond - v_uncond)``. Scale 1 is no guidance."""

    video: float
    audio: float


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
        """See :meth:`javis.model.dit.JavisDiT.denoise`."""
        ...


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
) -> tuple[Tensor, Tensor]:
    """Integrate from noise to latents.

    Args:
        model: the velocity model.
        video, audio: starting latents [B, Cv, T, H, W] and [B, Ca, Ta, M]; pure noise, or with masks the given latents
            where the mask is 0.
        condition: conditioning of the B prompts; with guidance of 2B samples, the unconditional ones last.
        timesteps: decreasing, [steps].
        guidance: one scale or one per modality.
        video_mask, audio_mask: float [B, T], [B, Ta]: 0 = given, 1 = generate, between = edit from that share of noise.
            If one is given, the other defaults to all ones.
        draw_noise: makes the noise for frames that become active, called with the latents once per step and modality,
            video first; default is ``torch.randn_like``.
        callback: sees every step before its update.
        on_step_end: called after every update with (number, timestep, video, audio); what it returns, if anything, goes
            on in place of the latents. Must keep their shapes.

    Returns:
        Final latents of video and audio.
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
    if masked:
        video_mask = video.new_ones(batch, video.shape[2]) if video_mask is None else video_mask
        audio_mask = audio.new_ones(batch, audio.shape[2]) if audio_mask is None else audio_mask
        video_active, audio_active = video_mask == 1, audio_mask == 1
    for i, now in enumerate(timesteps):
        t = now.to(video).expand(batch)
        video_in, audio_in, v_on, a_on = video, audio, None, None
        if video_mask is not None and audio_mask is not None:
            video_in, v_on = _masked_input(video, video_mask, video_active, t, draw_noise(video))
            audio_in, a_on = _masked_input(audio, audio_mask, audio_active, t, draw_noise(audio))
            video_active, audio_active = v_on, a_on
        out = _predict(model, video_in, audio_in, t, condition, v_on, a_on, guided)
        if callback is not None:
            callback(Step(i, float(now), video, audio, video_in, audio_in, v_on, a_on, out))
        after = timesteps[i + 1] if i + 1 < len(timesteps) else torch.zeros_like(now)
        dt = (now - after).to(video) / NUM_TIMESTEPS
        video, audio = flow_update(
            video, audio, out.video, out.audio, dt, scales.video, scales.audio, video_mask=v_on, audio_mask=a_on
        )
        if on_step_end is not None and (replaced := on_step_end(i, float(now), video, audio)) is not None:
            video, audio = _replaced(video, replaced[0]), _replaced(audio, replaced[1])
    return video, audio


def _replaced(old: Tensor, new: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise ValueError(f"on_step_end gave latents {list(new.shape)} in place of {list(old.shape)}")
    return new.to(old)


def _predict(
    model: Denoiser,
    video: Tensor,
    audio: Tensor,
    t: Tensor,
    condition: Conditioning,
    video_mask: Tensor | None,
    audio_mask: Tensor | None,
    guided: bool,
) -> Velocity:
    if guided:
        video, audio, t = torch.cat((video, video)), torch.cat((audio, audio)), torch.cat((t, t))
        if video_mask is not None and audio_mask is not None:
            video_mask, audio_mask = torch.cat((video_mask, video_mask)), torch.cat((audio_mask, audio_mask))
    return model.denoise(video, audio, t, condition, video_mask=video_mask, audio_mask=audio_mask)
