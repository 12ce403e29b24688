"""The maths of ada_layer_norm_fp8 in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch
from torch import Tensor

from javis.kernels.ops.ada_layer_norm.reference import ada_layer_norm_ref

E4M3_MAX = 448.0


def quantize_ref(y: Tensor, y_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """y in float32 or float64 to e4m3 and its scale; ``y_scale`` None: one per row."""
    if y_scale is None:
        largest = y.abs().amax(-1, keepdim=True)
        q = y * torch.where(largest == 0, torch.ones_like(largest), E4M3_MAX / largest)
        scale = torch.where(largest == 0, torch.ones_like(largest), largest / E4M3_MAX)[..., 0].float()
    else:
        q, scale = y * (1 / y_scale.to(y.dtype)), y_scale
    return q.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def ada_layer_norm_fp8_ref(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y_scale: Tensor | None = None,
    *,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in api.py; computes in float32, or float64 for float64 inputs."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = ada_layer_norm_ref(wide, shift, scale, shift0=shift0, scale0=scale0, frame_mask=frame_mask, eps=eps)
    return quantize_ref(y, y_scale)
