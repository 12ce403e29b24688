"""Calls of gelu_linear that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from javis.kernels.cases import OpCase


@dataclass(frozen=True, kw_only=True)
class GeluLinearCase(OpCase):
    """gelu_linear of [batch, tokens, width] to [batch, tokens, out]."""

    batch: int = 1
    tokens: int = 1  # N
    width: int = 1152  # C
    out: int = 4608  # F
    biased: bool = True
    op: str = field(default="gelu_linear", init=False)

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        x, weight = normal(self.batch, self.tokens, self.width), normal(self.out, self.width) * self.width**-0.5
        return (x, weight, normal(self.out) if self.biased else None), {}

    def bytes(self, *, backward: bool = False) -> int:
        tokens, weight = self.batch * self.tokens, self.out * self.width
        # Forward: x and W in, y out. Backward: dy, z, x and W in, dx and dW out.
        values = (
            tokens * (2 * self.out + 2 * self.width) + 2 * weight
            if backward
            else (tokens * (self.out + self.width) + weight)
        )
        return values * self.dtype.itemsize

    def flops(self, *, backward: bool = False) -> int:
        product = 2 * self.batch * self.tokens * self.width * self.out
        return 2 * product if backward else product


def cases() -> list[GeluLinearCase]:
    """Shapes of the full-size model (2 s clips) and of the built-in one, in float32 and bfloat16."""
    sizes: dict[str, dict[str, Any]] = {
        "video-240p": {"tokens": 15 * 405},
        "video-512x512": {"tokens": 15 * 1024},
        "audio-2s": {"tokens": 224},
        "demo": {"batch": 2, "tokens": 1024, "width": 128, "out": 384},
    }
    return [
        GeluLinearCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
