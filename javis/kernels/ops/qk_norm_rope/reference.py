"""The maths of qk_norm_rope in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch
from torch import Tensor


def qk_norm_rope_ref(
    qkv: Tensor,
    axis: str,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in api.py; computes in float32, or float64 for float64 inputs."""
    q, k, v = (qkv if axis == "spatial" else qkv.transpose(1, 2)).unbind(3)  # each [B, T, S, H, D] or [B, S, T, H, D]
    wide = torch.promote_types(qkv.dtype, torch.float32)

    def transform(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x.to(wide)
        if weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
        if rope is not None:
            cos, sin = (table.to(wide)[:, None] for table in rope)  # [L, 1, D/2], over the heads
            even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
            y = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
        return y.to(x.dtype)

    return transform(q, q_weight).flatten(0, 1), transform(k, k_weight).flatten(0, 1), v.flatten(0, 1)
