"""What PyTorch knows of factorized_attention: when its kernels can run, the shapes they return, their gradients.

The Triton ops (namespace javis) take q, k, v as views [N1, N2, L, H, D] with (N1, N2, L) = (B, T, S) for the spatial
axis and (B, S, T) for the temporal one; their gradient comes back packed, as one tensor, through one
``autograd.Function`` over qkv.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from javis.kernels import native
from javis.kernels.ops.qk_norm_rope import contract as prepared

FLASH_ATTN_DTYPES = (torch.float16, torch.bfloat16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
MAX_CUDA = 128  # frames, and values of a head: the scores of a sequence stay in registers
MAX_NATIVE = 256  # frames: beyond that the tiles of a head leave the second-level cache
why_not_triton = prepared.why_not_triton
split = prepared.split


def _has_flash_attn() -> bool:
    try:
        return importlib.util.find_spec("flash_attn") is not None
    except ModuleNotFoundError:  # an import hook hides it
        return False


HAS_FLASH_ATTN = _has_flash_attn()  # probed once, not imported


def why_not_cuda(
    qkv: Tensor,
    axis: str = "spatial",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    *_: object,
) -> str | None:
    """Why the CUDA kernel cannot take this call, or None."""
    reason = native.why_not_cuda(qkv, q_weight, k_weight, *(rope or ()), dtypes=CUDA_DTYPES)
    if reason is not None:
        return reason
    if axis != "temporal":
        return "only the temporal axis has a CUDA kernel"
    if qkv.shape[1] > MAX_CUDA:
        return f"{qkv.shape[1]} frames, at most {MAX_CUDA}"
    if qkv.shape[-1] % 8 or qkv.shape[-1] > MAX_CUDA:
        return f"heads of {qkv.shape[-1]} values, not a multiple of 8 up to {MAX_CUDA}"
    if qkv.shape[0] * qkv.shape[2] * qkv.shape[4] >= 2**31:
        return f"{qkv.shape[0] * qkv.shape[2] * qkv.shape[4]} sequences, fewer than 2^31"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, q_weight, k_weight)):
        reason = why_not_triton(qkv, axis, q_weight, k_weight, rope)
        return None if reason is None else f"an argument requires a gradient, whose kernel is Triton's: {reason}"
    return None


def why_not_cpu(
    qkv: Tensor,
    axis: str = "spatial",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    *_: object,
) -> str | None:
    """Why the native CPU kernels cannot take this call, or None.

    The temporal axis has one of its own; for the spatial one that of qk_norm_rope makes q and k ready for
    the native attention over whole sequences (../../dense_attention.py) or, where that is refused, PyTorch's.
    """
    if axis == "spatial":
        return prepared.why_not_cpu(qkv, axis, q_weight, k_weight, rope)
    reason = prepared.why_not_native(qkv, q_weight, k_weight, rope)
    if reason is not None:
        return reason
    if qkv.shape[1] > MAX_NATIVE:
        return f"{qkv.shape[1]} frames, at most {MAX_NATIVE}"
    return None


def why_not_flash_attn(qkv: Tensor, *_: object) -> str | None:
    """Why the flash-attn package cannot take this call, or None."""
    if not HAS_FLASH_ATTN:
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    if qkv.device.type != "cuda":
        return f"needs a CUDA device, got {qkv.device}"
    if qkv.dtype not in FLASH_ATTN_DTYPES:
        return f"no {str(qkv.dtype).removeprefix('torch.')} in flash-attn, only float16 and bfloat16"
    if qkv.shape[-1] % 8 or qkv.shape[-1] > 256:
        return f"heads of {qkv.shape[-1]} values; flash-attn takes multiples of 8 up to 256"
    return None


def why_not_sdpa(
    qkv: Tensor,
    axis: str = "spatial",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    *_: object,
) -> str | None:
    """Why PyTorch's own attention is not given this call, or None."""
    if any(t is not None and t.dtype == torch.float64 for t in (qkv, q_weight, k_weight, *(rope or ()))):
        return "float64 is computed by the reference"
    return None


def factorized_attention_triton(
    qkv: Tensor,
    axis: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """The Triton op on arguments that ``why_not_triton`` has accepted."""
    cos, sin = (None, None) if rope is None else rope
    weights = prepared.stack(q_weight, k_weight)
    y: Tensor = FactorizedAttention.apply(
        qkv if qkv.stride(-1) == 1 else qkv.contiguous(),
        weights, prepared.dense(cos), prepared.dense(sin), axis == "temporal", eps,
    )  # fmt: skip
    return y


_ARGUMENTS = "Tensor? weights, Tensor? cos, Tensor? sin, bool temporal, float eps"
torch.library.define("javis::factorized_attention", f"(Tensor qkv, {_ARGUMENTS}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "javis::factorized_attention_backward",
    f"(Tensor dout, Tensor qkv, Tensor? out, Tensor lse, {_ARGUMENTS}) -> (Tensor dqkv, Tensor dweights)",
)


def _views(qkv: Tensor, temporal: bool) -> tuple[Tensor, Tensor, Tensor]:
    return split(qkv, "temporal" if temporal else "spatial")


@torch.library.impl("javis::factorized_attention", ("CUDA", "CPU"))
def _forward(
    qkv: Tensor, weights: Tensor | None, cos: Tensor | None, sin: Tensor | None, temporal: bool, eps: float
) -> tuple[Tensor, Tensor]:
    from javis.kernels.ops.factorized_attention import triton_impl

    return triton_impl.forward(*_views(qkv, temporal), weights, cos, sin, temporal, eps)


@torch.library.impl("javis::factorized_attention_backward", ("CUDA", "CPU"))
def _backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    lse: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    temporal: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from javis.kernels.ops.factorized_attention import triton_impl

    return triton_impl.backward(dout, *_views(qkv, temporal), out, lse, weights, cos, sin, temporal, eps)


MAX_SHORT = 128  # longer sequences keep out and lse for the backward pass; triton_impl.py has the same number


@torch.library.register_fake("javis::factorized_attention")
def _forward_shapes(
    qkv: Tensor, weights: Tensor | None, cos: Tensor | None, sin: Tensor | None, temporal: bool, eps: float
) -> tuple[Tensor, Tensor]:
    batch, frames, places, _, heads, size = qkv.shape
    length, others = (frames, places) if temporal else (places, frames)
    statistics = (batch * others * heads, length) if length > MAX_SHORT else (0,)
    out = qkv.new_empty((batch, frames * places, heads * size))
    return out, qkv.new_empty(statistics, dtype=torch.float32)


@torch.library.register_fake("javis::factorized_attention_backward")
def _backward_shapes(dout: Tensor, qkv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty((2, qkv.shape[-1]), dtype=torch.float32)


class FactorizedAttention(torch.autograd.Function):
    """Triton: qkv [B, T, S, 3, H, D] of inner stride 1; weights float32 [2, D], tables float32 [L, D/2]."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        weights: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        temporal: bool,
        eps: float,
    ) -> Tensor:
        op = torch.ops.javis.factorized_attention.default
        out, lse = op(qkv, weights, cos, sin, temporal, eps)
        length = qkv.shape[1 if temporal else 2]
        ctx.save_for_backward(qkv, out if length > MAX_SHORT else None, lse, weights, cos, sin)
        ctx.options = (temporal, eps)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        op = torch.ops.javis.factorized_attention_backward.default
        dqkv, dweights = op(dout, *ctx.saved_tensors, *ctx.options)
        return dqkv, None if ctx.saved_tensors[3] is None else dweights, None, None, None, None


def temporal_attention_native(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """The native op on arguments that ``why_not_cpu`` has accepted."""
    cos, sin = (None, None) if rope is None else rope
    weights = prepared.stack(q_weight, k_weight)
    y: Tensor = TemporalAttention.apply(qkv, weights, prepared.dense(cos), prepared.dense(sin), eps)
    return y


def temporal_attention_cuda(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """The CUDA op on arguments that ``why_not_cuda`` has accepted."""
    cos, sin = (None, None) if rope is None else rope
    y: Tensor = TemporalAttentionCuda.apply(
        qkv, prepared.stack(q_weight, k_weight), prepared.dense(cos), prepared.dense(sin), eps
    )
    return y


class TemporalAttentionCuda(torch.autograd.Function):
    """CUDA, its gradient by Triton, which keeps nothing of a short sequence but qkv; else as TemporalAttention."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, weights: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(qkv, weights, cos, sin)
        ctx.eps = eps
        return torch.ops.javis_cuda.temporal_attention.default(qkv, weights, cos, sin, eps)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weights, cos, sin = ctx.saved_tensors
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        lse = qkv.new_empty((0,), dtype=torch.float32)
        op = torch.ops.javis.factorized_attention_backward.default
        dqkv, dweights = op(dout, qkv, None, lse, weights, cos, sin, True, ctx.eps)
        return dqkv, None if weights is None else dweights, None, None, None


class TemporalAttention(torch.autograd.Function):
    """Native: qkv [B, T, S, 3, H, D]; weights float32 [2, D], tables float32 [T, D/2]."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, weights: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(qkv, weights, cos, sin)
        ctx.eps = eps
        return torch.ops.javis_native.temporal_attention.default(qkv, weights, cos, sin, eps)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        op = torch.ops.javis_native.temporal_attention_backward.default
        dqkv, dweights = op(dout, *ctx.saved_tensors, ctx.eps)
        return dqkv, None if ctx.saved_tensors[1] is None else dweights, None, None, None


def _temporal_shapes(qkv: Tensor, *_: object) -> Tensor:
    batch, frames, places, _three, heads, size = qkv.shape
    return qkv.new_empty((batch, frames * places, heads * size))


if native.WHY_NOT is None:
    torch.library.register_fake("javis_native::temporal_attention")(_temporal_shapes)

    @torch.library.register_fake("javis_native::temporal_attention_backward")
    def _native_backward_shapes(dout: Tensor, qkv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return qkv.new_empty(qkv.shape), qkv.new_empty((2, qkv.shape[-1]), dtype=torch.float32)


if native.WHY_NOT_CUDA is None:
    torch.library.register_fake("javis_cuda::temporal_attention")(_temporal_shapes)
