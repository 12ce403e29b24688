"""The maths of ada_layer_norm in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch
from torch import Tensor


def ada_layer_norm_ref(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Arguments and result as in api.py; computes in float32, or float64 for float64 inputs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    xw = x.to(wide)
    centred = xw - xw.mean(-1, keepdim=True)
    xhat = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    shift_n, scale_n = shift.to(wide)[:, None], scale.to(wide)[:, None]  # [B, 1, C]
    if frame_mask is not None and shift0 is not None and scale0 is not None:
        tokens_per_frame = x.shape[1] // frame_mask.shape[1]
        first = frame_mask.repeat_interleave(tokens_per_frame, dim=1)[:, :, None]  # [B, N, 1]
        shift_n = torch.where(first, shift_n, shift0.to(wide)[:, None])
        scale_n = torch.where(first, scale_n, scale0.to(wide)[:, None])
    return (xhat * (1 + scale_n) + shift_n).to(x.dtype)
