"""Linear layers in FP8, with the sensitive ones kept in bfloat16.

>>> apply_precision(model, "fp8", keep=["layers.0.*", "*.mlp.fc2"])

Three choices, ``javis sample --precision``:

bf16    every parameter in bfloat16.
fp8     the large linear layers of the blocks as e4m3 products with one scale per row of the activations and one per
        output channel of the weights (``torch._scaled_mm``, summed in float32). Where a norm comes before, it writes
        e4m3 itself (``ada_layer_norm_fp8``), so that the activation is never in bfloat16.
fp8-te  the same layers on Transformer Engine, which scales whole tensors, by their own maxima ("current") or by those
        of earlier steps ("delayed").

Weights are quantised once, here. Folded priors, keys and values of captions, embeddings and final layers stay in
bfloat16: together they are a few percent of the work. Which further layers should stay is measured
(``python -m benchmarks.fp8_errors``); the list lives beside the weights as ``fp8.json`` (`read_keep`).

Read next: `Fp8Linear` and `product` (the arithmetic), `apply_precision` (what is replaced by what).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.errors import UsageError
from javis.fp8_te import Scaling, TeContext, TeLinear
from javis.kernels import OPS
from javis.model.blocks import BidirectionalBlock, PriorBlock, TransformerBlock
from javis.model.dit import JavisDiT

Precision = Literal["bf16", "fp8", "fp8-te"]

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
MULTIPLE = 16  # of which both sizes of a weight must be
KEEP_FILE = "fp8.json"


class Quantised(NamedTuple):
    """Rows in e4m3: the value of row i is ``values[..., i, :] * scale[..., i]``."""

    values: Tensor  # [..., C] e4m3
    scale: Tensor  # [...] float32


def quantise(x: Tensor) -> Quantised:
    """Each row scaled by its own maximum, x [..., C] of any floating dtype."""
    wide = x.float()
    scale = wide.abs().amax(-1).clamp(min=1e-12) / LARGEST
    return Quantised((wide / scale[..., None]).clamp(-LARGEST, LARGEST).to(E4M3), scale)


def product(
    x: Tensor | Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype, *, emulate: bool = False
) -> Tensor:
    """``x @ weight.T + bias`` in ``dtype``, of e4m3 values, accumulated in float32.

    Args:
        x: [..., C]; a tensor is quantised here.
        weight: e4m3 [F, C] with one scale per output. bias: [F].
        emulate: multiply the same e4m3 values in float32, on any device: what the hardware would give, but for the
            order (and on some GPUs the width) of its sums. Slower than bfloat16; for measuring errors.

    Raises:
        UsageError: without ``emulate``, where the device has no FP8 products.
    """
    x = x if isinstance(x, Quantised) else quantise(x)
    if emulate:
        # Products of two e4m3 values are exact in float32, and so is each value itself.
        out = x.values.float() @ weight.values.float().t()
        out = out * x.scale[..., None] * weight.scale
        return (out if bias is None else out + bias.float()).to(dtype)
    if (reason := why_not("fp8", x.values.device)) is not None:
        raise UsageError(f"FP8 product: {reason}")
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
    """A linear layer in e4m3. ``state_dict`` holds ``values``, ``scale`` and ``bias``, so it can be saved and loaded.

    Args:
        linear: the layer it replaces; its weight is rounded once, from the dtype it has.
        emulate: see `product`.

    Raises:
        ValueError: sizes that 16 does not divide, which the hardware needs.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, *, emulate: bool = False) -> None:
        super().__init__()
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            raise ValueError(f"FP8 needs sizes that {MULTIPLE} divides, got {tuple(linear.weight.shape)}")
        assert linear.bias is not None  # every linear layer of the model has one
        self.bias, self.emulate = linear.bias, emulate
        values, scale = quantise(linear.weight.detach())
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """``model.to(dtype)`` is about the numbers around the product: weights and scales keep their own dtypes."""
        kept = {name: getattr(self, name) for name in ("values", "scale")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    @property
    def weight(self) -> Fp8Linear:
        """The layer: an op that takes a weight (``gelu_linear``) finds the product here."""
        return self

    def forward(self, x: Tensor | Quantised) -> Tensor:
        """[..., C], quantised or not -> [..., F] in the dtype of the bias."""
        weight = Quantised(self.values, self.scale)
        return product(x, weight, self.bias, self.bias.dtype, emulate=self.emulate)


# -- the model --------------------------------------------------------------------------------------------------------


def _linears(block: nn.Module) -> Iterator[str]:
    """The linear layers of a block that see every token in every step."""
    if isinstance(block, TransformerBlock):
        yield from ("attn.qkv", "attn.proj", "text.q", "text.proj")
    if isinstance(block, (TransformerBlock, PriorBlock)):
        yield from ("mlp.fc1", "mlp.fc2")
    if isinstance(block, BidirectionalBlock):
        yield from (f"{stream}_{part}" for stream in ("video", "audio") for part in ("q", "v", "out"))


def linear_names(model: JavisDiT) -> list[str]:
    """Names of the layers that FP8 concerns, such as ``layers.3.video_spatial.attn.qkv``, in the order they run."""
    return [
        f"layers.{i}.{place}.{name}"
        for i, layer in enumerate(model._layers)
        for place, block in layer.blocks().items()
        for name in _linears(block)
    ]


def kept_names(model: JavisDiT, keep: Iterable[str]) -> list[str]:
    """Those of `linear_names` that match a pattern of ``keep`` (``*`` stands for anything).

    Raises:
        UsageError: a pattern that matches no layer.
    """
    names, kept = linear_names(model), set()
    for pattern in keep:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise UsageError(
                f"no linear layer is called {pattern!r}; expected {', '.join(names[:2])}, ... or a pattern"
            )
        kept |= found
    return [name for name in names if name in kept]


def why_not(precision: Precision, device: torch.device | str) -> str | None:
    """Why a model on this device cannot run in this precision, or None."""
    device = torch.device(device)
    if precision == "bf16" or device.type == "meta":
        return None
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return (
            f"needs a GPU with FP8 matrix products (compute capability 8.9 or higher), the model is on {device}; "
            "use bf16 there"
        )
    if precision == "fp8-te":
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            return f"needs Transformer Engine (pip install 'javis[gpu]'): {' '.join(str(error).split())[:200]}"
    return None


def apply_precision(
    model: JavisDiT,
    precision: Precision,
    *,
    keep: Iterable[str] = (),
    scaling: Scaling = "current",
    emulate: bool = False,
    dtype: torch.dtype | None = torch.bfloat16,
) -> JavisDiT:
    """Bring a model to a precision, in place, and return it.

    Args:
        model: with weights in any floating dtype, or on the meta device: then the FP8 layers are laid out, for
            ``load_state_dict(..., assign=True)`` of a state that was saved in FP8.
        precision: "bf16", "fp8" or "fp8-te"; see the top of this file.
        keep: names of `linear_names`, or patterns, of layers that stay in bfloat16.
        scaling: of Transformer Engine.
        emulate: compute FP8 products in float32 from the same e4m3 values, on any device ("fp8" only). For measuring
            errors; never chosen by itself.
        dtype: of all that is not in FP8; None leaves it as it is, to measure the error of FP8 alone (with ``emulate``).

    Raises:
        UsageError: an unknown precision, a device without FP8, a pattern in ``keep`` that matches nothing, layers whose
            sizes 16 does not divide, or a model that is in FP8 already.
    """
    if precision not in get_args(Precision):
        raise UsageError(f"unknown precision {precision!r}; expected one of {', '.join(get_args(Precision))}")
    if scaling not in get_args(Scaling):
        raise UsageError(f"unknown scaling {scaling!r}; expected one of {', '.join(get_args(Scaling))}")
    if any(isinstance(module, (Fp8Linear, TeLinear)) for module in model.modules()):
        raise UsageError("the model is in FP8 already; load it again to change its precision")
    kept = set(kept_names(model, keep))
    if precision == "bf16":
        return model.to(torch.bfloat16)
    if dtype != torch.bfloat16 and not emulate:
        raise UsageError(f"FP8 products give bfloat16 here, not {dtype}; only emulated ones can")
    if emulate and precision == "fp8-te":
        raise UsageError("Transformer Engine cannot be emulated; use fp8")
    weight = model.time_block.weight
    if not emulate and (reason := why_not(precision, weight.device)) is not None:
        raise UsageError(f"precision {precision}: {reason}")
    chosen = [name for name in linear_names(model) if name not in kept]
    for name in chosen:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shape = tuple(linear.weight.shape)
        if any(size % MULTIPLE for size in shape):
            raise UsageError(f"{name} is {shape}: FP8 needs sizes that {MULTIPLE} divides; keep it in bfloat16")
    context = TeContext(scaling) if precision == "fp8-te" else None
    for name in chosen:  # one after the other, so that both copies of one layer at most are there
        owner, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        made = Fp8Linear(linear, emulate=emulate) if context is None else TeLinear(linear, context)
        setattr(model.get_submodule(owner), attribute, made)
    if dtype is not None:
        model.to(dtype)
    for layer in model._layers:
        for block in layer.blocks().values():
            _wire(block)
    if context is not None:
        model.step_context = context
    return model


def precision_of(model: JavisDiT) -> dict[str, Any]:
    """What `apply_precision` was told, as json-able keyword arguments of it: to be saved beside the weights."""
    names = linear_names(model)
    kept = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    if len(kept) == len(names):
        return {"precision": "bf16"} if model.time_block.weight.dtype == torch.bfloat16 else {}
    te = any(isinstance(module, TeLinear) for module in model.modules())
    return {"precision": "fp8-te" if te else "fp8", "keep": kept}


def read_keep(folder: str | os.PathLike[str]) -> list[str]:
    """The layers to keep in bfloat16 as measured for the weights in ``folder``: ``fp8.json`` there, or none.

    Raises:
        UsageError: the file is there, but not usable.
    """
    path = Path(folder) / KEEP_FILE
    if not path.is_file():
        return []
    try:
        keep = json.loads(path.read_text(encoding="utf-8"))["keep"]
        if not isinstance(keep, list) or not all(isinstance(name, str) for name in keep):
            raise TypeError("keep must be a list of names")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(
            f"{path} is not usable ({error}); expected {{'keep': [names of layers]}} as written by python -m "
            "benchmarks.fp8_errors; remove it to keep no layer"
        ) from error
    return keep


# -- what surrounds the layers ----------------------------------------------------------------------------------------


# A `Quantised` goes from these norms to the layers; the blocks between them, typed for tensors, only pass it on.


def norm_to_fp8(*args: Any, **kwargs: Any) -> Any:
    """``ada_layer_norm`` that writes e4m3, one scale per row: gives a `Quantised`."""
    return Quantised(*OPS["ada_layer_norm_fp8"].function(*args, **kwargs))


def gated_norm_to_fp8(x: Tensor, h: Tensor, gate: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """``gated_residual_ada_layer_norm`` whose second result is a `Quantised`."""
    r, values, scale = OPS["gated_residual_ada_layer_norm_fp8"].function(x, h, gate, *args, **kwargs)
    return r, Quantised(values, scale)


def _plain_norm_to_fp8(x: Tensor) -> Quantised:
    """LayerNorm without affine parameters that writes e4m3."""
    zero = x.new_zeros(()).expand(x.shape[0], x.shape[-1])
    return norm_to_fp8(x, zero, zero)


def _gelu_linear(x: Tensor | Quantised, weight: Fp8Linear | TeLinear, bias: Tensor | None) -> Tensor:
    """``gelu_tanh`` of a layer, which stands where its weight would."""
    return F.gelu(weight(x), approximate="tanh")


def _in_fp8(*layers: nn.Module) -> bool:
    return all(isinstance(layer, Fp8Linear) for layer in layers)


def _wire(block: nn.Module) -> None:
    """Let norms write e4m3 where an e4m3 product is all that reads them, and the GELU follow the product."""
    if isinstance(block, BidirectionalBlock):
        if _in_fp8(block.video_q, block.video_v):
            block.video_norm = _plain_norm_to_fp8
        if _in_fp8(block.audio_q, block.audio_v):
            block.audio_norm = _plain_norm_to_fp8
        return
    assert isinstance(block, (TransformerBlock, PriorBlock))
    fc1: nn.Module = block.mlp.fc1
    if isinstance(fc1, (Fp8Linear, TeLinear)):
        block.mlp_ops = replace(block.ops, gelu_linear=_gelu_linear)
    if isinstance(fc1, Fp8Linear):
        block.mlp_ops = replace(block.mlp_ops, gated_residual_ada_layer_norm=gated_norm_to_fp8)
    if isinstance(block, TransformerBlock) and _in_fp8(block.attn.qkv):
        block.ops = replace(block.ops, ada_layer_norm=norm_to_fp8)


__all__ = [
    "Fp8Linear",
    "Precision",
    "Quantised",
    "Scaling",
    "apply_precision",
    "kept_names",
    "linear_names",
    "precision_of",
    "product",
    "quantise",
    "read_keep",
    "why_not",
]
