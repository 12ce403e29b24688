"""Matrix products on oneDNN, called directly, where that beats the library behind ``F.linear`` and ``torch.mm``.

PyTorch computes float32 products on MKL, which runs its AVX-512 code on Intel's processors only. oneDNN, which PyTorch
uses for convolutions and for bfloat16 products, looks at what the processor can do and not at who made it. Called is
``torch.ops.mkldnn._linear_pointwise``, the op that torch.compile makes linear layers of.

oneDNN adds up all summands of a float32 product, or a thousand of them, in one accumulator; its errors are then over
twice those of MKL, which begins anew after fewer (``python benchmarks/product_rounding.py``). Long float32 products are
therefore given to it in pieces, as ``javis::onednn_linear``.
"""

from __future__ import annotations

import platform
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor


def _load() -> str | None:
    """Why the op is not there, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no mkldnn::_linear_pointwise"
    return None


def _vendor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Who made the processor, as it says itself (GenuineIntel, AuthenticAMD); "" if that is not to be found."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return platform.processor().rpartition(", ")[2]  # Windows: "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel"


def _slower_in_float32(vendor: str, has_mkl: bool, capability: str) -> str | None:
    """Why float32 products should stay with PyTorch's own choice of a library, or None."""
    if not has_mkl or capability != "AVX512":
        return "no gain over PyTorch's float32 products is known here: they are not MKL's, or there is no AVX-512"
    if vendor in ("GenuineIntel", ""):
        return "PyTorch's float32 products are MKL's, which is at home on this processor"
    return None


WHY_NOT: str | None = _load()
_BFLOAT16 = WHY_NOT is None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
# For auto, decided once: the processor stays the same.
WHY_NOT_AUTO: str | None = _slower_in_float32(
    _vendor(), torch.backends.mkl.is_available(), torch.backends.cpu.get_cpu_capability()
)


def _enabled() -> bool:
    return torch._C._get_mkldnn_enabled()


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and Triton with it.
_enabled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(*tensors: Tensor | None) -> str | None:
    """Why oneDNN cannot multiply these, or None."""
    if WHY_NOT is not None:
        return WHY_NOT
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"needs CPU tensors, got one on {tensor.device}"
        if tensor.dtype == torch.bfloat16 and not _BFLOAT16:
            return "oneDNN has no bfloat16 products for this processor"
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"no {str(tensor.dtype).removeprefix('torch.')} products, only float32 and bfloat16"
    if not _enabled():
        return "oneDNN is switched off (torch.backends.mkldnn)"
    return None


def why_not_auto(first: Tensor) -> str | None:
    """Why ``auto`` leaves a product that oneDNN can compute to PyTorch's own choice of a library, or None.

    bfloat16 products are oneDNN's either way; the direct call saves the pass that lays out the bias before them.
    """
    return WHY_NOT_AUTO if first.dtype == torch.float32 else None


# Of a float32 product: the most summands that go into one accumulator, and the rows whose sums are held (in the cache)
# while the pieces are added to them.
_SUMMANDS, _ROWS = 288, 512


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` without a gradient, for arguments that ``why_not`` has accepted."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN takes rows or columns
    bias = None if bias is None else bias.contiguous()  # ... and reads a bias as dense whatever its stride
    if x.dtype == torch.float32 and weight.shape[1] > _SUMMANDS:
        return torch.ops.javis.onednn_linear(x, weight, bias)  # type: ignore[no-any-return]
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _linear_in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` in float32 with at most _SUMMANDS summands in a row; weight is dense in rows or columns."""
    rows, (features, width) = x.flatten(0, -2), weight.shape
    count = -(-width // _SUMMANDS)
    places = list(pairwise(width * i // count for i in range(count + 1)))
    by_rows = weight.is_contiguous()
    weights = [weight[:, i:j].contiguous() if by_rows else weight[:, i:j] for i, j in places]
    out = rows.new_empty(len(rows), features)
    for begin in range(0, len(rows), _ROWS):
        part = rows[begin : begin + _ROWS]
        total = _product(part[:, : places[0][1]], weights[0], bias)
        for (i, j), piece in zip(places[1:-1], weights[1:-1], strict=True):
            total += _product(part[:, i:j], piece, None)
        last = _product(part[:, places[-1][0] :], weights[-1], None)
        torch.add(total, last, out=out[begin : begin + _ROWS])
    return out.unflatten(0, x.shape[:-1])


# An op, so that torch.compile sees one node and not the loops.
torch.library.define("javis::onednn_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("javis::onednn_linear", "CPU", _linear_in_pieces)
torch.library.register_fake(
    "javis::onednn_linear", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0]))
)


def _faster(a: Tensor, b: Tensor) -> bool:
    wanted = a.dtype == torch.float32 and WHY_NOT_AUTO is None and 0 not in a.shape and 0 not in b.shape
    return wanted and why_not(a, b) is None


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch.mm(a, b)`` without a gradient on the faster library: for the products inside the CPU's ops."""
    return linear(a, b.t()) if _faster(a, b) else torch.mm(a, b)


def mm_of_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``torch.mm(a.t(), b)``, as ``mm``; a [N, I] and b [N, J] of many rows give [I, J], which may be a view.

    oneDNN wants its first factor dense, so the narrower of the two is the one that is laid out anew.
    """
    return mm(a.t(), b) if a.shape[1] <= b.shape[1] else mm(b.t(), a).t()


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm(a, b)``, as ``mm``; for a few large products, which are computed one after the other."""
    if not _faster(a, b):
        return torch.bmm(a, b)
    if len(a) == 1:
        return linear(a[0], b[0].t())[None]
    out = a.new_empty((*a.shape[:2], b.shape[2]))
    for part, left, right in zip(out, a, b, strict=True):
        part.copy_(linear(left, right.t()))
    return out
