"""The maths of flow_update in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch
from torch import Tensor


def flow_update_ref(
    video: Tensor,
    audio: Tensor,
    video_velocity: Tensor,
    audio_velocity: Tensor,
    dt: Tensor,
    guidance_video: float,
    guidance_audio: float,
    *,
    video_mask: Tensor | None = None,
    audio_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in api.py, ``dt`` a tensor; computes in float32, or float64 for float64 latents."""
    return (
        _update(video, video_velocity, dt, guidance_video, video_mask),
        _update(audio, audio_velocity, dt, guidance_audio, audio_mask),
    )


def _update(z: Tensor, velocity: Tensor, dt: Tensor, guidance: float, mask: Tensor | None) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    v = velocity[:, : z.shape[1]].to(wide)
    if v.shape[0] != z.shape[0]:
        conditional, unconditional = v.chunk(2)
        v = unconditional + guidance * (conditional - unconditional)
    step = dt.to(z.device, wide)
    if step.ndim:
        step = step.view(-1, *[1] * (z.ndim - 1))
    moved = (z.to(wide) + v * step).to(z.dtype)
    if mask is None:
        return moved
    return torch.where(mask.bool().view(z.shape[0], 1, z.shape[2], *[1] * (z.ndim - 3)), moved, z)
