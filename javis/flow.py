"""Rectified flow of two modalities: path, timesteps, targets, losses (Liu et al., arXiv 2209.03003).

``x_t = (1 - t/1000) * x + (t/1000) * noise`` with t in 0..1000; the model predicts ``x - noise``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000.0
_MASKED_MEAN_EPS = 1e-6


def _spread(value: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, T] -> broadcastable against latents [B, C, T, ...]."""
    if value.ndim == 1:
        return value.view(-1, *[1] * (like.ndim - 1))
    return value.view(value.shape[0], 1, value.shape[1], *[1] * (like.ndim - 3))


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point of the straight path at timestep t: ``(1 - t/1000) * x + (t/1000) * noise``.

    Args:
        x, noise: [B, C, T, ...]. t: [B], or [B, T] for a time per latent frame.
    """
    share = _spread(t.to(torch.float32) / NUM_TIMESTEPS, x)
    return (1 - share) * x + share * noise


def timestep_ratio(
    height: Tensor, width: Tensor, num_frames: Tensor, *, scale: float = 1.0, base_side: int = 512
) -> Tensor:
    """How much more signal a clip holds than one 512x512 picture: ``sqrt(H*W/512^2) * sqrt(latent frames) * scale``.

    Latent frames are ``frames // 17 * 5`` (the video VAE's windows), at least 1. The official code gives 0 and then
    NaN timesteps for 2..16 frames.

    Args:
        height, width: pixels, [B]; num_frames: frames of the clip, [B].
    """
    frames = torch.where(num_frames == 1, torch.ones_like(num_frames), num_frames // 17 * 5).clamp(min=1)
    return (height * width / base_side**2).sqrt() * frames.sqrt() * scale


def transform_timestep(t: Tensor, ratio: Tensor | float) -> Tensor:
    """Shift timesteps towards noise for larger clips: ``r*t / (1 + (r-1)*t)`` on t/1000 (SD 3, eq. 23)."""
    t = t / NUM_TIMESTEPS
    return ratio * t / (1 + (ratio - 1) * t) * NUM_TIMESTEPS


def timesteps(steps: int, ratio: Tensor | float = 1.0, *, start: float = NUM_TIMESTEPS) -> Tensor:
    """Timesteps of an Euler solution, ``(1 - i/steps) * 1000`` transformed -> [steps] (or [steps, B] for a ratio [B]).

    Args:
        steps, ratio: see above.
        start: the first timestep, in (0, 1000]; the others share out the rest of the untransformed time evenly.

    Raises:
        ValueError: fewer than one step, or a start out of range.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < start <= NUM_TIMESTEPS:
        raise ValueError(f"start must be a timestep above 0 and at most {NUM_TIMESTEPS:g}, got {start}")
    t = torch.tensor([(1.0 - i / steps) * NUM_TIMESTEPS for i in range(steps)])
    if isinstance(ratio, Tensor) and ratio.ndim:
        t = t[:, None].to(ratio.device)
    if start < NUM_TIMESTEPS:
        t = t * (transform_timestep(torch.tensor(start), 1 / ratio) / NUM_TIMESTEPS)
    return transform_timestep(t, ratio)


def sample_timesteps(
    batch: int, *, generator: torch.Generator | None = None, ratio: Tensor | float = 1.0, logit_std: float | None = 1.0
) -> Tensor:
    """Training timesteps [batch]: logit-normal (``logit_std=None``: uniform), then :func:`transform_timestep`."""
    if logit_std is None:
        t = torch.rand(batch, generator=generator)
    else:
        t = torch.sigmoid(torch.randn(batch, generator=generator) * logit_std)
    return transform_timestep(t * NUM_TIMESTEPS, ratio)


class FlowLoss(NamedTuple):
    """Losses per sample, [B] each; ``total = video + audio``."""

    total: Tensor
    video: Tensor
    audio: Tensor


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``error`` [B, C, T, ...] per sample over frames whose mask [B, T] is True -> [B].

    ``(sum + eps) / (count + eps)``, eps = 1e-6, so that a sample without any such frame has the constant loss 1.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    per_frame = error.movedim(2, 1).flatten(2)  # [B, T, elements of a frame]
    total = (per_frame.sum(2) * mask).sum(1)
    return (total + _MASKED_MEAN_EPS) / (mask.sum(1) * per_frame.shape[2] + _MASKED_MEAN_EPS)


def flow_losses(
    denoise: Callable[..., tuple[Tensor, Tensor]],
    video: Tensor,
    audio: Tensor,
    t: Tensor,
    *,
    video_noise: Tensor,
    audio_noise: Tensor,
    video_mask: Tensor | None = None,
    audio_mask: Tensor | None = None,
) -> FlowLoss:
    """Rectified-flow training losses of both modalities.

    Args:
        denoise: ``(video_t, audio_t, t, video_mask=, audio_mask=) -> (video, audio)``; channels beyond those of the
            latents (pred_sigma) are ignored.
        video, audio: clean latents [B, Cv, T, H, W], [B, Ca, Ta, M]; the noises have the same shapes.
        t: [B], 0..1000.
        video_mask, audio_mask: bool [B, T], [B, Ta]; frames with False are given clean and carry no loss.
    """
    inputs = []
    for x, noise, mask in ((video, video_noise, video_mask), (audio, audio_noise, audio_mask)):
        x_t = add_noise(x, noise, t)
        inputs.append(x_t if mask is None else torch.where(_spread(mask, x), x_t, x))
    predicted = denoise(inputs[0], inputs[1], t, video_mask=video_mask, audio_mask=audio_mask)
    losses = []
    for out, x, noise, mask in zip(
        predicted, (video, audio), (video_noise, audio_noise), (video_mask, audio_mask), strict=True
    ):
        error = (out[:, : x.shape[1]].float() - (x - noise).float()).square()
        losses.append(masked_mean(error, mask))
    return FlowLoss(losses[0] + losses[1], losses[0], losses[1])


def mean_over_generated(losses: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses per sample [B] and their mask [B, T] -> mean over the batch, mean over the samples that generate anything.

    A sample that is given whole has the constant loss 1 (:func:`masked_mean`); here it has none.
    """
    if mask is None:
        return losses.mean(), losses.mean()
    some = mask.any(dim=1)
    total = torch.where(some, losses, 0.0).sum()
    return total / len(losses), total / some.sum().clamp(min=1)
