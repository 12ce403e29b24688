"""What PyTorch knows of the native part of gelu_linear: when it can run, shapes, the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import native, onednn

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def why_not_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the native CPU kernel cannot take this call, or None."""
    if native.WHY_NOT is not None:
        return native.WHY_NOT
    if x.device.type != "cpu":
        return f"needs CPU tensors, x is on {x.device}"
    if x.dtype not in NATIVE_DTYPES:
        return f"no {str(x.dtype).removeprefix('torch.')} kernel, only float32 and bfloat16"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype of the product inside the reference"
    if weight.shape[0] == 0:
        return "nothing to compute: weight has no rows"
    return None


def gelu_linear_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A library's product and the native pass, on arguments that ``why_not_cpu`` has accepted."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if wanted:
        y: Tensor = GeluLinear.apply(x, weight, bias)
        return y
    z = onednn.mm(x.flatten(0, -2), weight.t())
    torch.ops.javis_native.bias_gelu_.default(z, _floats(bias))
    return z.unflatten(0, x.shape[:-1])


def _floats(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


class GeluLinear(torch.autograd.Function):
    """Keeps the product without the bias, as eager PyTorch keeps it with the bias: nothing is multiplied again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.flatten(0, -2)
        z = onednn.mm(rows, weight.t())
        ctx.save_for_backward(x, weight, bias, z)
        y = torch.ops.javis_native.bias_gelu.default(z, _floats(bias))
        return y.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, z = ctx.saved_tensors
        dz = torch.ops.javis_native.bias_gelu_backward.default(dy.flatten(0, -2), z, _floats(bias))
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = onednn.mm(dz, weight).unflatten(0, x.shape[:-1]) if need_x else None
        dweight = onednn.mm_of_transposed(dz, x.flatten(0, -2)) if need_weight else None
        return dx, dweight, dz.sum(0) if need_bias else None


if native.WHY_NOT is None:

    @torch.library.register_fake("javis_native::bias_gelu")
    def _forward_shape(z: Tensor, bias: Tensor | None) -> Tensor:
        return z.new_empty(z.shape)

    @torch.library.register_fake("javis_native::bias_gelu_")
    def _in_place(z: Tensor, bias: Tensor | None) -> None:
        return None

    @torch.library.register_fake("javis_native::bias_gelu_backward")
    def _backward_shape(dy: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
        return z.new_empty(z.shape)
