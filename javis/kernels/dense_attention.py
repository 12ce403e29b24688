"""The native attention of many queries to many keys on a CPU (csrc/cpu/dense_attention_tiles.h).

out[n, i, h] = sum over j of softmax_j(q[n, i, h] . k[n, j, h] / sqrt(D)) v[n, j, h]        over j with mask[n, j]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import native

DTYPES = (torch.float32, torch.bfloat16)
# torch.cpu has no public question for it in every version that is supported.
_HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
_ISA = native.cpu_isa()
_MULTIPLIES_BF16 = native.multiplies_bf16()
_SCORES = 1 << 24  # that the backward pass has at a time: 64 MB
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
        return "its gradient cannot be compiled: use sdpa"
    return None


def why_not_auto(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why PyTorch's own attention should be preferred for arguments that ``why_not`` has accepted, or None."""
    if wants_gradient(q, k, v):
        return "a gradient is wanted, for which the native op would compute the scores twice"
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
        [N, Lq, H, D], dense, differentiable: the backward pass computes the scores again, some heads at a time. The one
        of ``F.scaled_dot_product_attention`` leaves the error budget on long sequences, in either dtype.
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
        q, k, v, mask = ctx.saved_tensors
        dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
        heads = max(1, _SCORES // max(1, q.shape[1] * k.shape[1]))
        for n in range(q.shape[0]):
            for h in range(0, q.shape[2], heads):
                here = n, slice(None), slice(h, h + heads)
                valid = None if mask is None else mask[n]
                dq[here], dk[here], dv[here] = _gradients(q[here], k[here], v[here], valid, dout[here])
        return dq, dk, dv, None


def _gradients(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The explicit formula in float32, [L, h, D] each.

    P = softmax(q k^T / sqrt(D));  dv = P^T dout,  dS = P * (dP - rowsum(P * dP)) with dP = dout v^T,
    dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D)
    """
    q, k, v, dout = (tensor.transpose(0, 1).float() for tensor in (q, k, v, dout))  # [h, L, D]
    q = q * q.shape[-1] ** -0.5
    if mask is not None:  # whatever stands at an absent key must not count, not even times zero
        k, v = (tensor.masked_fill(~mask[:, None], 0) for tensor in (k, v))
    scores = q @ k.transpose(1, 2)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    p = scores.softmax(-1)
    if mask is not None and not bool(mask.any()):
        p.zero_()
    dscores = torch.ops.aten._softmax_backward_data.default(dout @ v.transpose(1, 2), p, -1, torch.float32)
    dq, dk, dv = dscores @ k * q.shape[-1] ** -0.5, dscores.transpose(1, 2) @ q, p.transpose(1, 2) @ dout
    return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


def _shape(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)  # new_empty, not empty_like: dense whatever the strides of q


if native.WHY_NOT is None:
    torch.library.register_fake("javis_native::dense_attention")(_shape)
