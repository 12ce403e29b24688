"""What PyTorch knows of folded_prior_injection: when the kernels can run, and their shapes. There is no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from javis.kernels import native, onednn
from javis.kernels.triton_support import why_not_triton

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
MAX_NATIVE_KEYS = 1024  # kMaxGroup in csrc/cpu/group_softmax_rows.h
MAX_TRITON_KEYS = 128  # a group lies inside one tile


def _why_not(y: Tensor, scores_weight: Tensor, scores_bias: Tensor, value: Tensor) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, scores_weight, scores_bias, value)):
        return "no backward pass: it is the form for sampling (use torch.no_grad(), or prior_injection to train)"
    for tensor in (scores_weight, value):
        if tensor.dtype != y.dtype:
            return f"needs one dtype, got {y.dtype} and {tensor.dtype}"
    return None


def why_not_triton_kernel(
    y: Tensor, scores_weight: Tensor, scores_bias: Tensor, value: Tensor, heads: int = 1
) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if scores_weight.shape[2] // heads > MAX_TRITON_KEYS:
        return f"at most {MAX_TRITON_KEYS} keys, got {scores_weight.shape[2] // heads}"
    return why_not_triton(y, scores_weight, scores_bias, value) or _why_not(y, scores_weight, scores_bias, value)


def why_not_cpu(y: Tensor, scores_weight: Tensor, scores_bias: Tensor, value: Tensor, heads: int = 1) -> str | None:
    """Why the native CPU kernel cannot take this call, or None."""
    if native.WHY_NOT is not None:
        return native.WHY_NOT
    if y.device.type != "cpu":
        return f"needs CPU tensors, y is on {y.device}"
    if y.dtype not in NATIVE_DTYPES:
        return f"no {str(y.dtype).removeprefix('torch.')} kernel, only float32 and bfloat16"
    if scores_weight.shape[2] // heads > MAX_NATIVE_KEYS:
        return f"at most {MAX_NATIVE_KEYS} keys, got {scores_weight.shape[2] // heads}"
    return _why_not(y, scores_weight, scores_bias, value)


def folded_native(y: Tensor, scores_weight: Tensor, scores_bias: Tensor, value: Tensor, heads: int) -> Tensor:
    """Two products of the library and the native softmax between them, in place."""
    scores = onednn.bmm(y, scores_weight)
    torch.ops.javis_native.group_softmax_.default(scores, scores_bias.float().contiguous(), heads)
    return onednn.bmm(scores, value)


if native.WHY_NOT is None:

    @torch.library.register_fake("javis_native::group_softmax_")
    def _group_softmax(scores: Tensor, bias: Tensor, groups: int) -> None:
        return None


torch.library.define(
    "javis::folded_prior_weights",
    "(Tensor y, Tensor scores_weight, Tensor scores_bias, int heads) -> Tensor",
)


@torch.library.impl("javis::folded_prior_weights", ("cpu", "cuda"))
def _weights(y: Tensor, scores_weight: Tensor, scores_bias: Tensor, heads: int) -> Tensor:
    from javis.kernels.ops.folded_prior_injection import triton_impl

    return triton_impl.weights(y, scores_weight, scores_bias, heads)


@torch.library.register_fake("javis::folded_prior_weights")
def _weights_shape(y: Tensor, scores_weight: Tensor, scores_bias: Tensor, heads: int) -> Tensor:
    return y.new_empty((y.shape[0], y.shape[1], scores_weight.shape[2]))


def folded_triton(y: Tensor, scores_weight: Tensor, scores_bias: Tensor, value: Tensor, heads: int) -> Tensor:
    """A product with the softmax in its epilogue (Triton), then a product of the library."""
    return torch.bmm(torch.ops.javis.folded_prior_weights.default(y, scores_weight, scores_bias, heads), value)
