"""The maths of gated_residual_ada_layer_norm_fp8 in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

from torch import Tensor

from javis.kernels.ops.ada_layer_norm_fp8.reference import ada_layer_norm_fp8_ref
from javis.kernels.ops.gated_residual_ada_layer_norm.reference import gated_residual_ref


def gated_residual_ada_layer_norm_fp8_ref(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    y_scale: Tensor | None = None,
    *,
    gate0: Tensor | None = None,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result as in api.py; computes in float32, or float64 for float64 inputs."""
    r = gated_residual_ref(x, h, gate, gate0=gate0, frame_mask=frame_mask)
    q, scales = ada_layer_norm_fp8_ref(
        r, shift, scale, y_scale, shift0=shift0, scale0=scale0, frame_mask=frame_mask, eps=eps
    )
    return r, q, scales
