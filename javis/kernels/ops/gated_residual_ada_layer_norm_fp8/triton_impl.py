"""Triton kernel of gated_residual_ada_layer_norm_fp8: see ../ada_layer_norm_fp8/triton_impl.py."""

from __future__ import annotations

import torch
from torch import Tensor

from javis.kernels.ops.ada_layer_norm import aot_specs as specs
from javis.kernels.ops.ada_layer_norm import triton_impl as norm
from javis.kernels.triton_support import AotSpec


def forward(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    y_scale: Tensor | None,
    gate0: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """javis::gated_residual_ada_layer_norm_fp8: r, q and, without y_scale, one scale per row."""
    r, q = x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.uint8)
    row_scale = x.new_empty(x.shape[:2] if y_scale is None else (0,), dtype=torch.float32)
    on, off = (gate, shift, scale), (gate0, shift0, scale0)
    fp8, fp8_scale = ("rows", row_scale) if y_scale is None else ("static", y_scale)
    norm.launch_forward(x, h, on, off, frame_mask, eps, r=r, y=q, fp8=fp8, fp8_scale=fp8_scale)
    return r, q.view(torch.float8_e4m3fn), row_scale


def aot_specs() -> list[AotSpec]:
    """The configurations of the full-size model (C = 1152, bfloat16) with a gate, without and with a frame mask."""
    options = norm.row_options(specs.WIDTH)
    return [
        spec
        for fp8 in ("static", "rows")
        for spec in specs.forward(norm.forward_rows, f"gated fp8 {fp8}", options, residual=True, gate=True, fp8=fp8)
    ]
