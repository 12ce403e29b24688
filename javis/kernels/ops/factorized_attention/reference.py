"""The maths of factorized_attention in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch
from torch import Tensor


def factorized_attention_ref(
    qkv: Tensor,
    axis: str,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Arguments and result as in api.py; computes in float32, or float64 for float64 inputs."""
    batch, frames, places, _, heads, size = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    sequence_last = qkv.transpose(1, 2) if axis == "temporal" else qkv  # [B, S, T, ...] or [B, T, S, ...]
    q, k, v = sequence_last.to(wide).transpose(2, 4).unbind(3)  # each [B, S or T, H, L, D]

    def transform(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
        if rope is not None:
            cos, sin = (table.to(wide) for table in rope)  # [L, D/2]
            even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
            x = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
        return x

    scores = transform(q, q_weight) @ transform(k, k_weight).mT * size**-0.5
    out = (scores.softmax(-1) @ v).transpose(2, 3)  # [B, S or T, L, H, D]
    if axis == "temporal":
        out = out.transpose(1, 2)
    return out.reshape(batch, frames * places, heads * size).to(qkv.dtype)
