"""What PyTorch knows of gated_residual_ada_layer_norm_fp8: when its kernel can run, its shapes. No gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import native
from javis.kernels.ops.ada_layer_norm.contract import uniform, uniform_for_cuda
from javis.kernels.ops.ada_layer_norm.contract import why_not_triton as why_not_triton
from javis.kernels.ops.ada_layer_norm_fp8.contract import FLOAT8
from javis.kernels.ops.gated_residual_ada_layer_norm.contract import why_not_cuda as why_not_cuda


def gated_residual_ada_layer_norm_fp8_triton(
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
    """The Triton op on arguments that ``why_not_triton`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    gate, shift, scale, *zero = uniform(gate, shift, scale, gate0, shift0, scale0)  # type: ignore[assignment]
    given = None if y_scale is None else y_scale.to(x.device)
    op = torch.ops.javis.gated_residual_ada_layer_norm_fp8.default
    r, q, row_scale = op(x, h, gate, shift, scale, given, *zero, mask, eps)
    return r, q, row_scale if y_scale is None else y_scale


def gated_residual_ada_layer_norm_fp8_cuda(
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
    """The CUDA op on arguments that ``why_not_cuda`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    modulation = uniform_for_cuda(x, gate, shift, scale, gate0, shift0, scale0)
    gate, shift, scale, *zero = modulation  # type: ignore[assignment]
    given = None if y_scale is None else y_scale.to(x.device)
    op = torch.ops.javis_cuda.gated_residual_ada_layer_norm_fp8.default
    r, q, row_scale = op(x, h.to(x.dtype), gate, shift, scale, given, *zero, mask, eps)
    return r, q, row_scale if y_scale is None else y_scale


torch.library.define(
    "javis::gated_residual_ada_layer_norm_fp8",
    "(Tensor x, Tensor h, Tensor? gate, Tensor shift, Tensor scale, Tensor? y_scale, Tensor? gate0, Tensor? shift0,"
    " Tensor? scale0, Tensor? frame_mask, float eps) -> (Tensor r, Tensor q, Tensor row_scale)",
)


@torch.library.register_fake("javis::gated_residual_ada_layer_norm_fp8")
def _shapes(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, y_scale: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:2] if y_scale is None else (0,)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=FLOAT8), x.new_empty(rows, dtype=torch.float32)


if native.WHY_NOT_CUDA is None:
    torch.library.register_fake("javis_cuda::gated_residual_ada_layer_norm_fp8")(_shapes)


@torch.library.impl("javis::gated_residual_ada_layer_norm_fp8", ("CPU", "CUDA"))
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from javis.kernels.ops.gated_residual_ada_layer_norm_fp8 import triton_impl  # imports Triton, on the first call

    return triton_impl.forward(*args)
