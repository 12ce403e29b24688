"""factorized_attention: self-attention along one axis of packed projections, with RMS norm of q and k and RoPE.

    q^, k^ = rope(rms_norm(q)), rope(rms_norm(k))                        per head; see ../qk_norm_rope/api.py
    out[i] = sum over j of softmax_j(q^[i] . k^[j] / sqrt(D)) v[j]       i, j along the axis, for each head and place

The space and the time of a clip are attended to in turn (arXiv 2102.05095), as Open-Sora and JavisDiT do.

Read next: reference.py (the maths), triton_impl.py (short sequences), flash/triton_impl.py (long ones),
csrc/cuda/temporal_attention.cu and csrc/cpu/temporal_attention_rows.cpp (the temporal axis), library.py (attention of
other packages, and ../../dense_attention.py, which the spatial axis has on a CPU).
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.factorized_attention import contract, library
from javis.kernels.ops.factorized_attention.reference import factorized_attention_ref
from javis.kernels.ops.qk_norm_rope.api import validate


def _always(*_: object) -> str | None:
    return None


CHECKS: dict[Backend, Check] = {
    Backend.CUDA: contract.why_not_cuda,
    Backend.TRITON: contract.why_not_triton,
    Backend.CPU: contract.why_not_cpu,
    Backend.FLASH_ATTN: contract.why_not_flash_attn,
    Backend.SDPA: contract.why_not_sdpa,
    Backend.REFERENCE: _always,
}


def factorized_attention(
    qkv: Tensor,
    axis: str,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Return attention along ``axis``, softmax and sums in float32 (float64 for float64).

    Args:
        qkv: packed projections, [B, T, S, 3, H, D], read in place whatever its strides but the last.
        axis: "temporal" (over T, for each place) or "spatial" (over S, in each frame).
        q_weight, k_weight: RMS norm weights, [D]; both None: no norm.
        rope: (cos, sin), each [length of the axis, D/2]; None: no rotation. Constants: no gradient flows to them.
        eps: of the RMS norm, added to the mean square.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        [B, T*S, H*D] in the dtype of ``qkv``, differentiable in qkv and the weights.

    Raises:
        ValueError: an unknown axis, shapes or dtypes that do not fit together, one weight without the other.
        UsageError: the named backend cannot run this call; the message says why.
    """
    validate(qkv, axis, q_weight, k_weight, rope)
    if rope is not None:
        rope = (rope[0].detach(), rope[1].detach())
    chosen = select("factorized_attention", CHECKS, qkv, axis, q_weight, k_weight, rope, backend=backend)
    if chosen is Backend.CUDA:
        return contract.temporal_attention_cuda(qkv, q_weight, k_weight, rope, eps)
    if chosen is Backend.TRITON:
        return contract.factorized_attention_triton(qkv, axis, q_weight, k_weight, rope, eps)
    if chosen is Backend.CPU and axis == "temporal":
        return contract.temporal_attention_native(qkv, q_weight, k_weight, rope, eps)
    if chosen is Backend.FLASH_ATTN:
        return library.attention_flash_attn(qkv, axis, q_weight, k_weight, rope, eps)
    if chosen is Backend.CPU and qkv.numel() > 0:
        return library.attention_cpu(qkv, axis, q_weight, k_weight, rope, eps)
    if chosen is Backend.SDPA and qkv.numel() > 0:
        return library.attention_sdpa(qkv, axis, q_weight, k_weight, rope, eps)
    return factorized_attention_ref(qkv, axis, q_weight=q_weight, k_weight=k_weight, rope=rope, eps=eps)
