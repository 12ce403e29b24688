"""Triton kernel of ada_layer_norm_fp8: that of ada_layer_norm, which rounds its rows to float8.

From compute capability 8.9 on the hardware converts; elsewhere, and in the interpreter, integer arithmetic does, to the
same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from javis.kernels.ops.ada_layer_norm import aot_specs as specs
from javis.kernels.ops.ada_layer_norm import triton_impl as norm
from javis.kernels.triton_support import AotSpec


def forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y_scale: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """javis::ada_layer_norm_fp8: q and, without y_scale, one scale per row."""
    q = x.new_empty(x.shape, dtype=torch.uint8)
    row_scale = x.new_empty(x.shape[:2] if y_scale is None else (0,), dtype=torch.float32)
    on, off = (None, shift, scale), (None, shift0, scale0)
    fp8, fp8_scale = ("rows", row_scale) if y_scale is None else ("static", y_scale)
    norm.launch_forward(x, None, on, off, frame_mask, eps, r=None, y=q, fp8=fp8, fp8_scale=fp8_scale)
    return q.view(torch.float8_e4m3fn), row_scale


def aot_specs() -> list[AotSpec]:
    """The configurations of the full-size model (C = 1152, bfloat16), without and with a frame mask."""
    options = norm.row_options(specs.WIDTH)
    return [
        spec for fp8 in ("static", "rows") for spec in specs.forward(norm.forward_rows, f"fp8 {fp8}", options, fp8=fp8)
    ]
