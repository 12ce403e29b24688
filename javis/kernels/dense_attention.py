"""The native attention of many queries to many keys on a CPU (csrc/cpu/dense_attention_tiles.h).

out[n, i, h] = sum over j of softmax_j(q[n, i, h] . k[n, j, h] / sqrt(D)) v[n, j, h]        over j with mask[n, j]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from javis.kernels import native

DTYPES = (torch.float32, torch.bfloat16)
# torch.cpu has no public question for it in every version that is supported.
_HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
_ISA = native.cpu_isa()
_MULTIPLIES_BF16 = native.multiplies_bf16()
MAX_SIZE = 128  # of a head: the values of a score are added up one by one, which is good enough for so many


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will ask this call for a gradient."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the native op cannot take q, k, v, or None."""
    if native.WHY_NOT is not None:
        return native.WHY_NOT
    if q.device.type != "cpu":
        return f"needs CPU tensors, q is on {q.device}"
    if not q.dtype == k.dtype == v.dtype:
        return f"needs q, k and v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.dtype not in DTYPES:
        return f"no {str(q.dtype).removeprefix('torch.')} kernel, only float32 and bfloat16"
    if k.shape[-1] > MAX_SIZE:  # not of q, whose heads may still be joined
        return f"heads of {k.shape[-1]} values, at most {MAX_SIZE}"
    if q.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return "autocast would have it in a shorter dtype"
    if wants_gradient(q, k, v) and torch.compiler.is_compiling():
        return "its gradient, which is that of PyTorch's attention, cannot be compiled: use sdpa"
    return None


def why_not_auto(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why PyTorch's own attention should be preferred for arguments that ``why_not`` has accepted, or None."""
    if wants_gradient(q, k, v):
        return "a gradient is wanted, for which the native op would compute the attention twice"
    if _ISA != "avx512":
        return "without AVX-512 it is not known to be faster than PyTorch's"
    if q.dtype == torch.bfloat16 and _HAS_AMX:
        return "this processor multiplies tiles of bfloat16 (AMX), which PyTorch's attention uses"
    if q.dtype == torch.bfloat16 and not _MULTIPLIES_BF16:
        return "this processor has no products of bfloat16 (AVX512_BF16), or JAVIS_CPU_ISA turns them off"
    return None


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention on arguments that ``why_not`` has accepted, softmax and sums in float32.

    Args:
        q: float32 or bfloat16 [N, Lq, H, D], of any strides.
        k, v: [N, Lk, H, D] in the same dtype, Lk > 0.
        mask: bool [N, Lk], False = no key, whose numbers are never read. None: all are there. A sample without a key
            gets zeros.

    Returns:
        [N, Lq, H, D], dense, differentiable: the backward pass is that of ``F.scaled_dot_product_attention``, which
        computes its forward pass for it.
    """
    mask = None if mask is None else mask.contiguous()
    if wants_gradient(q, k, v):
        return DenseAttention.apply(q, k, v, mask)  # type: ignore[no-any-return]
    return torch.ops.javis_native.dense_attention.default(q, k, v, mask)  # type: ignore[no-any-return]


class DenseAttention(torch.autograd.Function):
    """See ``dense_attention``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        return torch.ops.javis_native.dense_attention.default(q, k, v, mask)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
            return (*torch.autograd.grad(out, leaves, dout.transpose(1, 2)), None)


def _shape(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)  # new_empty, not empty_like: dense whatever the strides of q


if native.WHY_NOT is None:
    torch.library.register_fake("javis_native::dense_attention")(_shape)
