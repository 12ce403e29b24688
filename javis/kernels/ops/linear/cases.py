"""Calls of linear that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from javis.kernels.ops.gelu_linear.cases import GeluLinearCase


@dataclass(frozen=True, kw_only=True)
class LinearCase(GeluLinearCase):
    """linear of [batch, tokens, width] to [batch, tokens, out]; inputs and FLOPs are those of gelu_linear."""

    out: int = 3456  # F
    op: str = field(default="linear", init=False)

    def bytes(self, *, backward: bool = False) -> int:
        tokens, weight = self.batch * self.tokens, self.out * self.width
        # Forward: x and W in, y out. Backward: dy, x and W in, dx and dW out.
        values = tokens * (self.out + (2 if backward else 1) * self.width) + (2 if backward else 1) * weight
        return values * self.dtype.itemsize


def cases() -> list[LinearCase]:
    """Projections of the full-size model (2 s clips) and of the built-in one, in float32 and bfloat16."""
    sizes: dict[str, dict[str, Any]] = {
        "qkv-240p": {"tokens": 15 * 405},
        "mlp-240p": {"tokens": 15 * 405, "width": 4608, "out": 1152},
        "qkv-512x512": {"tokens": 15 * 1024},
        "audio-2s": {"tokens": 224},
        "demo": {"batch": 2, "tokens": 1024, "width": 128, "out": 384},
    }
    return [
        LinearCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
