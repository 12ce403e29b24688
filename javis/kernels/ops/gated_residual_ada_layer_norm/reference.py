"""The maths of gated_residual_ada_layer_norm in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch
from torch import Tensor

from javis.kernels.ops.ada_layer_norm.reference import ada_layer_norm_ref


def gated_residual_ref(
    x: Tensor, h: Tensor, gate: Tensor | None, *, gate0: Tensor | None = None, frame_mask: Tensor | None = None
) -> Tensor:
    """``x + gate * h``, rounded to the dtype of ``x``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    moved = h.to(wide)
    if gate is not None:
        gate_n = gate.to(wide)[:, None]  # [B, 1, C]
        if frame_mask is not None and gate0 is not None:
            first = frame_mask.bool().repeat_interleave(x.shape[1] // frame_mask.shape[1], dim=1)[:, :, None]
            gate_n = torch.where(first, gate_n, gate0.to(wide)[:, None])
        moved = gate_n * moved
    return (x.to(wide) + moved).to(x.dtype)


def gated_residual_ada_layer_norm_ref(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    gate0: Tensor | None = None,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in api.py; computes in float32, or float64 for float64 inputs."""
    r = gated_residual_ref(x, h, gate, gate0=gate0, frame_mask=frame_mask)
    y = ada_layer_norm_ref(r, shift, scale, shift0=shift0, scale0=scale0, frame_mask=frame_mask, eps=eps)
    return r, y
