"""What PyTorch knows of qk_norm_rope: when its kernels can run, the shapes they return, their gradient.

The registered ops take q and k as strided [N1, N2, L, H, D], views of the packed projections: the caller's ``unbind``
joins their gradients with that of v in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import native, triton_support

MAX_SIZE = 128  # of a head: two tiles of 64 columns, or one of 128
MAX_NATIVE = 256  # of a head: kMaxHead in csrc/cpu/qk_norm_rope_rows.h
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def why_not_triton(
    qkv: Tensor,
    axis: str = "spatial",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    *_: object,
) -> str | None:
    """Why no Triton kernel can take this call, or None."""
    reason = triton_support.why_not_triton(qkv, q_weight, k_weight, *(rope or ()))
    if reason is not None:
        return reason
    if qkv.shape[-1] > MAX_SIZE:
        return f"heads of {qkv.shape[-1]} values, at most {MAX_SIZE}"
    if qkv.numel() // qkv.shape[-1] >= 2**31:  # rows are counted in int32, offsets in int64
        return f"{qkv.numel() // qkv.shape[-1]} rows, fewer than 2^31"
    return None


def why_not_native(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rope: tuple[Tensor, Tensor] | None
) -> str | None:
    """Why no native CPU kernel over packed projections can take these, or None; shared with factorized_attention."""
    if native.WHY_NOT is not None:
        return native.WHY_NOT
    if qkv.device.type != "cpu":
        return f"needs CPU tensors, qkv is on {qkv.device}"
    if qkv.dtype not in NATIVE_DTYPES:
        return f"no {str(qkv.dtype).removeprefix('torch.')} kernel, only float32 and bfloat16"
    if any(t is not None and t.dtype == torch.float64 for t in (q_weight, k_weight, *(rope or ()))):
        return "an argument is float64, which the kernel would round to float32"
    return None


def why_not_cpu(
    qkv: Tensor,
    axis: str = "spatial",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    *_: object,
) -> str | None:
    """Why the native CPU kernel cannot take this call, or None."""
    reason = why_not_native(qkv, q_weight, k_weight, rope)
    if reason is not None:
        return reason
    if qkv.shape[-1] > MAX_NATIVE:
        return f"heads of {qkv.shape[-1]} values, at most {MAX_NATIVE}"
    return None


def dense(tensor: Tensor | None) -> Tensor | None:
    """A weight or table as the kernels take it; small, so that one dtype and layout suffice below."""
    return None if tensor is None else tensor.float().contiguous()


def stack(q_weight: Tensor | None, k_weight: Tensor | None) -> Tensor | None:
    """Both weights as one float32 [2, D], so that the kernels choose by an offset."""
    return None if q_weight is None or k_weight is None else torch.stack((q_weight.float(), k_weight.float()))


def split(qkv: Tensor, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views [N1, N2, L, H, D] of inner stride 1: (B, T, S) for the spatial axis, (B, S, T) for temporal."""
    q, k, v = (qkv if qkv.stride(-1) == 1 else qkv.contiguous()).unbind(3)
    return (q, k, v) if axis == "spatial" else (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def qk_norm_rope_fused(
    qkv: Tensor,
    axis: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float,
    *,
    native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered ops on arguments that ``why_not_triton`` or ``why_not_cpu`` has accepted."""
    q, k, v = split(qkv, axis)
    cos, sin = (None, None) if rope is None else rope
    q, k = QkNormRope.apply(q, k, stack(q_weight, k_weight), dense(cos), dense(sin), eps, native)
    return q, k, v.flatten(0, 1)


_ARGUMENTS = "Tensor q, Tensor k, Tensor? weights, Tensor? cos, Tensor? sin, float eps"
torch.library.define("javis::qk_norm_rope", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    "javis::qk_norm_rope_backward", f"(Tensor dq, Tensor dk, {_ARGUMENTS}) -> (Tensor dq, Tensor dk, Tensor dweights)"
)


@torch.library.impl("javis::qk_norm_rope", ("CUDA", "CPU"))
def _forward(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from javis.kernels.ops.qk_norm_rope import triton_impl

    return triton_impl.forward(q, k, *rest)


@torch.library.impl("javis::qk_norm_rope_backward", ("CUDA", "CPU"))
def _backward(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from javis.kernels.ops.qk_norm_rope import triton_impl

    dq_in, dk_in = q.new_empty(q.shape), k.new_empty(k.shape)
    dweights = triton_impl.backward(dq.contiguous(), dk.contiguous(), q, k, dq_in, dk_in, *rest)
    return dq_in, dk_in, dweights


@torch.library.register_fake("javis::qk_norm_rope")
def _forward_shapes(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0] * q.shape[1], *q.shape[2:])
    return q.new_empty(shape), k.new_empty(shape)


@torch.library.register_fake("javis::qk_norm_rope_backward")
def _backward_shapes(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty((2, q.shape[-1]), dtype=torch.float32)


if native.WHY_NOT is None:
    torch.library.register_fake("javis_native::qk_norm_rope")(_forward_shapes)
    torch.library.register_fake("javis_native::qk_norm_rope_backward")(_backward_shapes)


class QkNormRope(torch.autograd.Function):
    """q, k [N1, N2, L, H, D] of equal strides; weights [2, D] and tables float32; see api.py.

    ``native`` says which pair of ops runs: both take the same arguments and give the same shapes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        weights: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        native: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, weights, cos, sin)
        ctx.eps, ctx.native = eps, native
        op = torch.ops.javis_native.qk_norm_rope if native else torch.ops.javis.qk_norm_rope
        return op.default(q, k, weights, cos, sin, eps)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        op = torch.ops.javis_native.qk_norm_rope_backward if ctx.native else torch.ops.javis.qk_norm_rope_backward
        dq, dk, dweights = op.default(dq, dk, *ctx.saved_tensors, ctx.eps)
        return dq, dk, None if ctx.saved_tensors[2] is None else dweights, None, None, None, None
