"""What PyTorch knows of group_norm_silu: when its kernels can run, the shapes they return, their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import triton_support


def why_not_triton(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    reason = triton_support.why_not_triton(x, weight, bias)
    if reason is None and not x.movedim(1, -1).is_contiguous():
        return "x is not channels-last (convert it with x.to(memory_format=torch.channels_last) or channels_last_3d)"
    return reason


def group_norm_silu_triton(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The Triton ops on arguments that ``why_not_triton`` has accepted."""
    y: Tensor = GroupNormSilu.apply(x.movedim(1, -1).flatten(1, -2), num_groups, weight.float(), bias.float(), eps)
    return y.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


class GroupNormSilu(torch.autograd.Function):
    """On x [B, places, C], dense; weight and bias float32 [C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.ops.javis.group_norm_silu.default(x, num_groups, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.num_groups = num_groups
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        op = torch.ops.javis.group_norm_silu_backward.default
        dx, dweight, dbias = op(dy, *ctx.saved_tensors, ctx.num_groups)
        return dx, None, dweight, dbias, None


torch.library.define(
    "javis::group_norm_silu",
    "(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "javis::group_norm_silu_backward",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, int num_groups)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


@torch.library.register_fake("javis::group_norm_silu")
def _forward_shapes(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


@torch.library.register_fake("javis::group_norm_silu_backward")
def _backward_shapes(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)


# Triton is imported by the first call.


@torch.library.impl("javis::group_norm_silu", ("CPU", "CUDA"))
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from javis.kernels.ops.group_norm_silu import triton_impl

    return triton_impl.forward(*args)


@torch.library.impl("javis::group_norm_silu_backward", ("CPU", "CUDA"))
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from javis.kernels.ops.group_norm_silu import triton_impl

    return triton_impl.backward(*args)
