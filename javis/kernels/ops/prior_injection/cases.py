"""Calls of prior_injection that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from javis.kernels.cases import OpCase


@dataclass(frozen=True, kw_only=True)
class CrossAttentionCase(OpCase):
    """Tokens [batch, tokens, heads * size] over keys and values [batch, heads, keys, size]."""

    batch: int = 1
    tokens: int = 1  # N
    keys: int = 32  # M
    heads: int = 16  # H
    size: int = 72  # D
    masked: bool = False  # a different number of keys for every sample
    op: str = field(default="prior_injection", init=False)

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        q = normal(self.batch, self.tokens, self.heads * self.size)
        # As in the model: views of one packed projection [B, M, 2, H, D].
        k, v = normal(self.batch, self.keys, 2, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        if not self.masked:
            return (q, k, v), {}
        kept = torch.randint(1, self.keys + 1, (self.batch, 1), generator=generator)
        return (q, k, v), {"mask": (torch.arange(self.keys) < kept).to(device)}

    def bytes(self, *, backward: bool = False) -> int:
        tokens = self.batch * self.tokens * self.heads * self.size * self.dtype.itemsize
        keys = 2 * self.batch * self.keys * self.heads * self.size * self.dtype.itemsize
        # Forward: q in, o out. Backward: q and do in, dq out; keys and values in, and their gradients out.
        return 3 * tokens + 2 * keys if backward else 2 * tokens + keys

    def flops(self, *, backward: bool = False) -> int:
        # Products alone: forward q k^T and p v; backward q k^T again, do v^T, ds k, ds^T q, p^T do.
        product = 2 * self.batch * self.tokens * self.keys * self.heads * self.size
        return 5 * product if backward else 2 * product


def cases() -> list[CrossAttentionCase]:
    """Shapes of the full-size model (2 s clips) and of the built-in one, in float32 and bfloat16."""
    sizes: dict[str, dict[str, Any]] = {
        "video-512x512": {"tokens": 15 * 1024},
        "video-240p": {"tokens": 15 * 405},
        "audio-2s": {"tokens": 224},
        "demo": {"batch": 2, "tokens": 1024, "keys": 8, "heads": 4, "size": 32},
    }
    return [
        CrossAttentionCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
