"""What PyTorch knows of linear on oneDNN: when it can run, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import onednn


def why_not_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why oneDNN cannot take this call, or None."""
    reason = onednn.why_not(x, weight, bias)
    if reason is not None:
        return reason
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype of the product inside the reference"
    if weight.numel() == 0 or x.numel() == 0:
        return "nothing to multiply"
    return None


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN on arguments that ``why_not_onednn`` has accepted."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = Linear.apply(x, weight, bias)
        return y
    return onednn.linear(x, weight, bias)


class Linear(torch.autograd.Function):
    """x [B, N, C], weight [F, C], bias [F] or None, all float32 or all bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = onednn.mm(rows, weight).unflatten(0, x.shape[:-1]) if need_x else None
        dweight = onednn.mm_of_transposed(rows, x.flatten(0, -2)) if need_weight else None
        return dx, dweight, rows.sum(0) if need_bias else None
