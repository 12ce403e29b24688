"""factorized_attention on attention that knows of neither norm nor rotation, of libraries or native.

q and k are normalised and rotated before, in one pass over them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from javis.kernels import dense_attention
from javis.kernels.ops.qk_norm_rope.api import prepare


def _tokens(out: Tensor, qkv: Tensor, axis: str) -> Tensor:
    """[B*T, S, H, D] or [B*S, T, H, D] -> [B, T*S, H*D]."""
    batch, frames, places, _, heads, size = qkv.shape
    if axis == "temporal":
        out = out.unflatten(0, (batch, places)).transpose(1, 2)
    return out.reshape(batch, frames * places, heads * size)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def attention_sdpa(
    qkv: Tensor,
    axis: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """``F.scaled_dot_product_attention``; arguments and result as in api.py."""
    q, k, v = prepare(qkv, axis, q_weight, k_weight, rope, eps)
    return _tokens(_sdpa(q, k, v), qkv, axis)


def attention_cpu(
    qkv: Tensor,
    axis: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """The native attention with gradients and wherever it is known to be the faster one, else PyTorch's.

    With gradients PyTorch's is within the error budget in neither dtype on long sequences. Where the native one is
    refused it runs in float32 then: in bfloat16 it is further off, and slower.
    """
    q, k, v = prepare(qkv, axis, q_weight, k_weight, rope, eps)
    gradient = dense_attention.wants_gradient(q, k, v)
    if dense_attention.why_not(q, k, v) is None and (gradient or dense_attention.why_not_auto(q, k, v) is None):
        return _tokens(dense_attention.dense_attention(q, k, v), qkv, axis)
    if gradient:
        q, k, v = q.float(), k.float(), v.float()
    return _tokens(_sdpa(q, k, v).to(qkv.dtype), qkv, axis)


def attention_flash_attn(
    qkv: Tensor,
    axis: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """``flash_attn_func`` of the flash-attn package; arguments and result as in api.py."""
    from flash_attn import flash_attn_func

    q, k, v = prepare(qkv, axis, q_weight, k_weight, rope, eps)
    return _tokens(flash_attn_func(q, k, v), qkv, axis)
