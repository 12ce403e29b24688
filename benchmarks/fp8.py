"""Linear layers in FP8 for the latency ladder: what it would bring, before it becomes a part of the model.

``quantise_linears(model)`` replaces the large linear layers of the blocks by e4m3 products with one scale per row of
the activations and per output channel of the weights (``torch._scaled_mm``, accumulated in float32). Where a norm comes
before, the norm writes e4m3 itself (``ada_layer_norm_fp8``), so that the activation is never in bfloat16; elsewhere its
rows are scaled by their own maximum. Folded priors, keys and values of captions, embeddings and final layers stay.

``te_linears(model)`` does the same with Transformer Engine, where that is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.kernels import OPS
from javis.model.blocks import BidirectionalBlock, JavisLayer, PriorBlock, TransformerBlock
from javis.model.dit import JavisDiT

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
MULTIPLE = 16  # of which both sizes of a weight must be


class Quantised(NamedTuple):
    """Rows in e4m3: the value of row i is ``values[..., i, :] * scale[..., i]``."""

    values: Tensor  # [..., C] e4m3
    scale: Tensor  # [...] float32


def quantise(x: Tensor) -> Quantised:
    """Each row scaled by its own maximum."""
    wide = x.float()
    scale = wide.abs().amax(-1).clamp(min=1e-12) / LARGEST
    return Quantised((wide / scale[..., None]).clamp(-LARGEST, LARGEST).to(E4M3), scale)


def product(x: Tensor | Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias`` in ``dtype``; weight e4m3 [out, in] with one scale per output."""
    x = x if isinstance(x, Quantised) else quantise(x)
    out = torch._scaled_mm(
        x.values.flatten(0, -2),
        weight.values.t(),
        x.scale.reshape(-1, 1),
        weight.scale.reshape(1, -1),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.unflatten(0, x.values.shape[:-1])


class Fp8Linear(nn.Module):
    """A linear layer in e4m3. ``weight`` is a record, so that an op which takes the weight itself gets it quantised."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            raise ValueError(f"FP8 needs sizes that {MULTIPLE} divides, got {tuple(linear.weight.shape)}")
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        self.values, self.scale = quantise(linear.weight.detach())

    @property
    def weight(self) -> Quantised:
        return Quantised(self.values, self.scale)

    def forward(self, x: Tensor | Quantised) -> Tensor:
        return product(x, self.weight, self.bias, self.dtype)


def fp8_gelu_linear(x: Tensor | Quantised, weight: Quantised, bias: Tensor | None) -> Tensor:
    """``gelu_tanh(x @ weight.T + bias)`` in the dtype of the bias."""
    assert bias is not None
    return F.gelu(product(x, weight, bias, bias.dtype), approximate="tanh")


def norm_to_fp8(*args: Any, **kwargs: Any) -> Quantised:
    return Quantised(*OPS["ada_layer_norm_fp8"].function(*args, **kwargs))


def gated_norm_to_fp8(x: Tensor, h: Tensor, gate: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Quantised]:
    r, values, scale = OPS["gated_residual_ada_layer_norm_fp8"].function(x, h, gate, *args, **kwargs)
    return r, Quantised(values, scale)


def linears(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The linear layers of a block that are worth it, as (owner, name)."""
    if isinstance(block, TransformerBlock):
        yield from [(block.attn, "qkv"), (block.attn, "proj"), (block.text, "q"), (block.text, "proj")]
    if isinstance(block, (TransformerBlock, PriorBlock)):
        yield from [(block.mlp, "fc1"), (block.mlp, "fc2")]
    if isinstance(block, BidirectionalBlock):
        yield from [(block, f"{stream}_{part}") for stream in ("video", "audio") for part in ("q", "v", "out")]


def blocks(layer: JavisLayer) -> dict[str, nn.Module]:
    """The parts of a layer by name, those it has."""
    return {name: block for name, block in layer.named_children() if block is not None}


def replace_linears(model: JavisDiT, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put ``make(linear)`` in the place of each of `linears`."""
    for layer in model._layers:
        for block in blocks(layer).values():
            for owner, name in linears(block):
                setattr(owner, name, make(getattr(owner, name)))


def quantise_linears(model: JavisDiT) -> JavisDiT:
    """In place; see the top of this file."""
    replace_linears(model, Fp8Linear)
    for layer in model._layers:
        for block in blocks(layer).values():
            if isinstance(block, PriorBlock):  # its norms feed the folded priors, which stay in bfloat16
                block.ops = replace(block.ops, gelu_linear=fp8_gelu_linear)
            elif isinstance(block, TransformerBlock):
                block.ops = replace(
                    block.ops,
                    ada_layer_norm=norm_to_fp8,
                    gated_residual_ada_layer_norm=gated_norm_to_fp8,
                    gelu_linear=fp8_gelu_linear,
                )
    return model


class _TeLinear(nn.Module):
    """Transformer Engine's linear layer. ``weight`` is the layer: `gelu_linear` calls it instead of multiplying."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        import transformer_engine.pytorch as te

        size_out, size_in = linear.weight.shape
        self.inner = te.Linear(
            size_in, size_out, bias=True, params_dtype=linear.weight.dtype, device=linear.weight.device
        )
        with torch.no_grad():
            self.inner.weight.copy_(linear.weight)
            self.inner.bias.copy_(linear.bias)
        self.bias = None

    @property
    def weight(self) -> _TeLinear:
        return self

    def forward(self, x: Tensor) -> Tensor:
        import transformer_engine.pytorch as te

        with te.fp8_autocast(enabled=True):
            out: Tensor = self.inner(x)
        return out


def te_linears(model: JavisDiT) -> JavisDiT:
    """In place: the same layers on Transformer Engine, which scales whole tensors by the maxima of earlier steps."""
    replace_linears(model, _TeLinear)

    def gelu_linear(x: Tensor, weight: _TeLinear, bias: None) -> Tensor:
        return F.gelu(weight(x), approximate="tanh")

    for layer in model._layers:
        for block in blocks(layer).values():
            if isinstance(block, (TransformerBlock, PriorBlock)):
                block.ops = replace(block.ops, gelu_linear=gelu_linear)
    return model
