"""Linear layers of the blocks in FP8 while training: torch's scaled products ("fp8") or Transformer Engine ("fp8-te").

Of the three products of a layer, the output and the gradient of its input are made of e4m3 values, each row of both
factors with a scale of its own (javis/precision.py); the gradient of the weight, which adds over all tokens, stays in
bfloat16. Weights stay float32 between steps and are quantised anew in each. Transformer Engine scales whole tensors by
their own maxima, e4m3 forward and e5m2 backward; that recipe keeps no state that a checkpoint would have to hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.errors import UsageError
from javis.model.blocks import PriorBlock, TransformerBlock
from javis.model.embed import Linear
from javis.model.ops import ModelOps
from javis.precision import MULTIPLE, product, quantise, why_not


class _Fp8Product(torch.autograd.Function):
    """``x @ weight.T + bias`` in FP8, x [..., C], weight [F, C], bias [F]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, emulate: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.emulate, ctx.has_bias = emulate, bias is not None
        return product(x, quantise(weight), bias, x.dtype, emulate=emulate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), grad = ctx.saved_tensors, grads[0]
        rows = grad.flatten(0, -2)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:  # a sum over outputs: the scales belong to the columns of the weight
            d_x = product(grad, quantise(weight.t().contiguous()), None, grad.dtype, emulate=ctx.emulate)
        if ctx.needs_input_grad[1]:
            d_weight = rows.t() @ x.flatten(0, -2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            d_bias = rows.sum(0)
        return d_x, d_weight, d_bias, None


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, emulate: bool = False) -> Tensor:
    """``linear`` of `ModelOps` in FP8, with gradients. ``emulate``: as in :func:`javis.precision.product`."""
    out: Tensor = _Fp8Product.apply(x, weight, bias, emulate)
    return out


def fp8_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, emulate: bool = False) -> Tensor:
    """``gelu_linear`` of `ModelOps` in FP8, with gradients."""
    return F.gelu(fp8_linear(x, weight, bias, emulate=emulate), approximate="tanh")


def _large(blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that see every token: (owner, attribute, layer)."""
    found: list[tuple[nn.Module, str, nn.Linear]] = []
    for module in _modules(blocks):
        if isinstance(module, (TransformerBlock, PriorBlock)):
            found.append((module.mlp, "fc1", module.mlp.fc1))
        found += [(module, name, child) for name, child in module.named_children() if isinstance(child, Linear)]
    return found


def _modules(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for block in blocks for module in block.modules()]


def train_in_fp8(blocks: Sequence[nn.Module], precision: str, device: torch.device, *, emulate: bool = False) -> None:
    """Let the large linear layers of ``blocks`` compute in FP8, in place, parameters and their names unchanged.

    Args:
        blocks: layers or blocks of JavisDiT.
        precision: "fp8" or "fp8-te". emulate: "fp8" without the hardware, for measuring and testing.

    Raises:
        UsageError: a device without FP8, Transformer Engine missing, blocks without such layers, sizes that 16 does not
            divide.
    """
    if precision not in ("fp8", "fp8-te"):
        raise ValueError(f"precision {precision!r} is not one of FP8")
    if not emulate and (reason := why_not("fp8" if precision == "fp8" else "fp8-te", device)) is not None:
        raise UsageError(f"precision {precision}: {reason}")
    layers = _large(blocks)
    if not layers:
        raise UsageError(f"precision {precision}: the task has no linear layer in blocks of JavisDiT; use bf16")
    for _, name, layer in layers:
        if any(size % MULTIPLE for size in layer.weight.shape):
            shape = tuple(layer.weight.shape)
            raise UsageError(f"{name} is {shape}: FP8 needs sizes that {MULTIPLE} divides; use bf16")
    if precision == "fp8-te":
        _on_transformer_engine(blocks, layers)
        return
    linear, gelu = partial(fp8_linear, emulate=emulate), partial(fp8_gelu_linear, emulate=emulate)
    for module in _modules(blocks):
        for name in ("ops", "mlp_ops"):
            if isinstance(ops := getattr(module, name, None), ModelOps):
                setattr(module, name, replace(ops, linear=linear, gelu_linear=gelu))


def _gelu_of(layer: nn.Module, x: Tensor, *_: Any) -> Tensor:
    """``gelu_linear`` of a layer that is called itself, whatever weight it is given."""
    return F.gelu(layer(x), approximate="tanh")


def _on_transformer_engine(blocks: Sequence[nn.Module], layers: list[tuple[nn.Module, str, nn.Linear]]) -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    for owner, name, layer in layers:
        size_out, size_in = layer.weight.shape
        made = te.Linear(
            size_in, size_out, bias=layer.bias is not None, params_dtype=layer.weight.dtype, device=layer.weight.device
        )
        with torch.no_grad():
            made.weight.copy_(layer.weight)
            if layer.bias is not None:
                made.bias.copy_(layer.bias)
        made.weight.requires_grad_(layer.weight.requires_grad)
        if layer.bias is not None:
            made.bias.requires_grad_(layer.bias.requires_grad)
        setattr(owner, name, made)
    told = recipe.Float8CurrentScaling(fp8_format=recipe.Format.HYBRID)

    def in_fp8(forward: Callable[..., Any]) -> Callable[..., Any]:
        """Inside the block, so that activations that are computed again are so in FP8, too."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if hasattr(te, "autocast"):  # since 2.9
                context = te.autocast(enabled=True, recipe=told)
            else:
                context = te.fp8_autocast(enabled=True, fp8_recipe=told)
            with context:
                return forward(*args, **kwargs)

        return run

    for module in _modules(blocks):
        if isinstance(module, (TransformerBlock, PriorBlock)):
            module.mlp_ops = replace(module.mlp_ops, gelu_linear=partial(_gelu_of, module.mlp.fc1))
    for block in blocks:
        block.forward = in_fp8(block.forward)  # type: ignore[method-assign]


__all__ = ["fp8_gelu_linear", "fp8_linear", "train_in_fp8"]
