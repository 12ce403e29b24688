"""What PyTorch knows of the native ada_layer_norm: when it can run, the shapes it returns, its gradient.

The schemas are in csrc/registration.cpp. Two registered ops make one differentiable call through an
``autograd.Function``, which costs less per call than ``torch.library.register_autograd`` and traces the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import native

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def why_not_cpu(x: Tensor, *modulation: Tensor | None) -> str | None:
    """Why the native CPU kernel cannot take this call, or None."""
    if native.WHY_NOT is not None:
        return native.WHY_NOT
    if x.device.type != "cpu":
        return f"needs CPU tensors, x is on {x.device}"
    if x.dtype not in NATIVE_DTYPES:
        return f"no {str(x.dtype).removeprefix('torch.')} kernel, only float32 and bfloat16"
    for tensor in modulation:
        if tensor is not None and tensor.device.type != "cpu":
            return f"needs CPU tensors, the modulation is on {tensor.device}"
        if tensor is not None and tensor.dtype == torch.float64:
            return "the modulation is float64, which the kernel would round to float32"
    return None


def ada_layer_norm_native(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> Tensor:
    """The native op on arguments that ``why_not_cpu`` has accepted."""

    def dense(tensor: Tensor | None) -> Tensor | None:  # [B, C]: small, so that one dtype and layout suffice below
        return None if tensor is None else tensor.float().contiguous()

    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    y: Tensor = AdaLayerNorm.apply(x, dense(shift), dense(scale), dense(shift0), dense(scale0), mask, eps)
    return y


class AdaLayerNorm(torch.autograd.Function):
    """x in float32 or bfloat16, modulation in float32; see api.py for the shapes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        shift0: Tensor | None,
        scale0: Tensor | None,
        frame_mask: Tensor | None,
        eps: float,
    ) -> Tensor:
        op = torch.ops.javis_native.ada_layer_norm.default
        y, mean, rstd = op(x, shift, scale, shift0, scale0, frame_mask, eps)
        ctx.save_for_backward(x, mean, rstd, scale, scale0, frame_mask)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dmodulation = torch.ops.javis_native.ada_layer_norm_backward.default(dy, *ctx.saved_tensors)
        if dmodulation.shape[0] == 2:
            return dx, dmodulation[0], dmodulation[1], None, None, None, None
        return dx, dmodulation[0], dmodulation[1], dmodulation[2], dmodulation[3], None, None


if native.WHY_NOT is None:

    @torch.library.register_fake("javis_native::ada_layer_norm")
    def _forward_shapes(
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        shift0: Tensor | None,
        scale0: Tensor | None,
        frame_mask: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # new_empty, not empty_like: the kernel allocates dense outputs whatever the strides of x.
        statistic = x.new_empty(x.shape[:2], dtype=torch.float32)
        return x.new_empty(x.shape), statistic, torch.empty_like(statistic)

    @torch.library.register_fake("javis_native::ada_layer_norm_backward")
    def _backward_shapes(
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        scale0: Tensor | None,
        frame_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sums = 2 if frame_mask is None else 4
        return x.new_empty(x.shape), x.new_empty((sums, x.shape[0], x.shape[2]), dtype=torch.float32)
