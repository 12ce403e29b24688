"""The maths of attention over a few shared keys in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_attention_ref(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Arguments and result as in api.py; computes in float32, or float64 for float64 inputs."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, size = k.shape[1], k.shape[3]
    queries = q.to(wide).unflatten(-1, (heads, size)).transpose(1, 2)  # [B, H, N, D]
    scores = queries @ k.to(wide).transpose(-1, -2) * size**-0.5
    if mask is not None:
        # A softmax over nothing is 0/0, also in its gradient: such samples keep all scores and lose their weights.
        told = mask.any(dim=-1, keepdim=True)
        scores = scores.masked_fill((told & ~mask)[:, None, None], float("-inf"))
        weights = scores.softmax(-1) * told[:, None, None]
    else:
        weights = scores.softmax(-1)
    return (weights @ v.to(wide)).transpose(1, 2).flatten(2).to(q.dtype)
