"""flow_update: one step of the sampler, for both modalities in one launch.

    v = v_unconditional + guidance * (v_conditional - v_unconditional)          with guidance
    z[b, :, t] <- z[b, :, t] + dt[b] * v[b, :, t]                               where frame t is active

This is an Euler step along the rectified flow, as in javis/sample/euler.py: v points from noise to data and dt is
positive. Each modality has its guidance scale. In plain PyTorch it is a dozen launches a step on small tensors.

Read next: reference.py (the maths), contract.py (what torch.compile sees), triton_impl.py (the kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.flow_update import contract
from javis.kernels.ops.flow_update.reference import flow_update_ref


def _always(*_: object) -> str | None:
    return None


CHECKS: dict[Backend, Check] = {
    Backend.TRITON: contract.why_not_triton,
    Backend.REFERENCE: _always,
}


def flow_update(
    video: Tensor,
    audio: Tensor,
    video_velocity: Tensor,
    audio_velocity: Tensor,
    dt: Tensor | float,
    guidance_video: float = 1.0,
    guidance_audio: float = 1.0,
    *,
    video_mask: Tensor | None = None,
    audio_mask: Tensor | None = None,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor]:
    """Return the latents after one Euler step with classifier-free guidance.

    Computed in float32 (float64 for float64 latents) and rounded once to the dtype of the latents; velocities may have
    a dtype of their own, say bfloat16 beside float32 latents.

    Args:
        video: latents, [B, Cv, T, H, W].
        audio: latents, [B, Ca, Ta, M].
        video_velocity: what the model predicts, [2B, C, T, H, W], the B conditional samples first, then the
            unconditional ones; or [B, C, T, H, W] without guidance. C >= Cv; of more channels the first Cv count
            (the others predict a variance).
        audio_velocity: the same for audio, [2B or B, C, Ta, M].
        dt: length of the step in 0..1, positive; a number, [] or [B].
        guidance_video, guidance_audio: guidance scales; without unconditional samples they must be 1.
        video_mask, audio_mask: bool [B, T], [B, Ta]; frames where it is False keep their value. None: all move.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        New video and audio latents, in shape and dtype like the old ones. Only the reference is differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        UsageError: the named backend cannot run this call; the message says why.
    """
    _validate("video", video, video_velocity, guidance_video, video_mask)
    _validate("audio", audio, audio_velocity, guidance_audio, audio_mask)
    if video.shape[0] != audio.shape[0]:
        raise ValueError(f"video has {video.shape[0]} samples, expected as many as audio, {audio.shape[0]}")
    if not isinstance(dt, Tensor):
        dt = torch.full((), float(dt), dtype=torch.promote_types(video.dtype, torch.float32), device=video.device)
    if not dt.dtype.is_floating_point or tuple(dt.shape) not in ((), (video.shape[0],)):
        raise ValueError(f"dt must be a floating-point [] or [{video.shape[0]}], got {dt.dtype} {tuple(dt.shape)}")
    dt = dt.to(video.device) if dt.ndim == 0 and video.device.type != "meta" else dt
    scales = (float(guidance_video), float(guidance_audio))
    tensors = (video, audio, video_velocity, audio_velocity, dt, *scales, video_mask, audio_mask)
    if select("flow_update", CHECKS, *tensors, backend=backend) is Backend.TRITON:
        return contract.flow_update_triton(*tensors)
    return flow_update_ref(
        video, audio, video_velocity, audio_velocity, dt, *scales, video_mask=video_mask, audio_mask=audio_mask
    )


def _validate(name: str, z: Tensor, velocity: Tensor, guidance: float, mask: Tensor | None) -> None:
    ndim, layout = (5, "[B, Cv, T, H, W]") if name == "video" else (4, "[B, Ca, Ta, M]")
    if z.ndim != ndim or not z.dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating-point {layout}, got {z.dtype} {tuple(z.shape)}")
    batch, channels = z.shape[:2]
    fits = velocity.ndim == z.ndim and velocity.shape[0] in (batch, 2 * batch) and velocity.shape[1] >= channels
    if not fits or velocity.shape[2:] != z.shape[2:] or not velocity.dtype.is_floating_point:
        raise ValueError(
            f"{name}_velocity must be a floating-point [{batch} or {2 * batch}, at least {channels}, "
            f"{', '.join(map(str, z.shape[2:]))}] for {name} {tuple(z.shape)}, got {velocity.dtype} "
            f"{tuple(velocity.shape)}"
        )
    if velocity.shape[0] == batch and batch > 0 and guidance != 1:
        raise ValueError(f"guidance_{name} must be 1 without unconditional samples (a velocity of 2B), got {guidance}")
    if mask is not None and (
        tuple(mask.shape) != (batch, z.shape[2]) or mask.dtype.is_floating_point or mask.dtype.itemsize != 1
    ):
        raise ValueError(f"{name}_mask must be a bool [{batch}, {z.shape[2]}], got {mask.dtype} {tuple(mask.shape)}")
