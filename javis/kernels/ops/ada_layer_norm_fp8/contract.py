"""What PyTorch knows of ada_layer_norm_fp8: when its kernel can run and the shapes it returns. There is no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import native
from javis.kernels.ops.ada_layer_norm.contract import uniform, uniform_for_cuda
from javis.kernels.ops.ada_layer_norm.contract import why_not_cuda as why_not_cuda
from javis.kernels.ops.ada_layer_norm.contract import why_not_triton as why_not_triton

FLOAT8 = torch.float8_e4m3fn


def ada_layer_norm_fp8_triton(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y_scale: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The Triton op on arguments that ``why_not_triton`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    shift, scale, shift0, scale0 = uniform(shift, scale, shift0, scale0)  # type: ignore[assignment]
    given = None if y_scale is None else y_scale.to(x.device)
    q, row_scale = torch.ops.javis.ada_layer_norm_fp8.default(x, shift, scale, given, shift0, scale0, mask, eps)
    return q, row_scale if y_scale is None else y_scale


def ada_layer_norm_fp8_cuda(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y_scale: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The CUDA op on arguments that ``why_not_cuda`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    shift, scale, shift0, scale0 = uniform_for_cuda(x, shift, scale, shift0, scale0)  # type: ignore[assignment]
    op = torch.ops.javis_cuda.ada_layer_norm_fp8.default
    given = None if y_scale is None else y_scale.to(x.device)
    q, row_scale = op(x, shift, scale, given, shift0, scale0, mask, eps)
    return q, row_scale if y_scale is None else y_scale


torch.library.define(
    "javis::ada_layer_norm_fp8",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? y_scale, Tensor? shift0, Tensor? scale0, Tensor? frame_mask,"
    " float eps) -> (Tensor q, Tensor row_scale)",
)


@torch.library.register_fake("javis::ada_layer_norm_fp8")
def _shapes(x: Tensor, shift: Tensor, scale: Tensor, y_scale: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    rows = x.shape[:2] if y_scale is None else (0,)
    return x.new_empty(x.shape, dtype=FLOAT8), x.new_empty(rows, dtype=torch.float32)


if native.WHY_NOT_CUDA is None:
    torch.library.register_fake("javis_cuda::ada_layer_norm_fp8")(_shapes)


@torch.library.impl("javis::ada_layer_norm_fp8", ("CPU", "CUDA"))
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from javis.kernels.ops.ada_layer_norm_fp8 import triton_impl  # imports Triton, on the first call

    return triton_impl.forward(*args)
