"""Calls of qk_norm_rope that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from javis.kernels.cases import OpCase


@dataclass(frozen=True, kw_only=True)
class QkNormRopeCase(OpCase):
    """qk_norm_rope of packed projections [batch, frames, places, 3, heads, size]."""

    axis: str = "spatial"
    batch: int = 1
    frames: int = 1  # T
    places: int = 1  # S
    heads: int = 16  # H
    size: int = 72  # D
    norm: bool = True
    rope: bool = False
    op: str = field(default="qk_norm_rope", init=False)

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Tensor, str], dict[str, Any]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        qkv = normal(self.batch, self.frames, self.places, 3, self.heads, self.size)
        kwargs: dict[str, Any] = {}
        if self.norm:
            kwargs |= {"q_weight": 1 + 0.5 * normal(self.size), "k_weight": 1 + 0.5 * normal(self.size)}
        if self.rope:
            length = self.frames if self.axis == "temporal" else self.places
            angles = torch.arange(length)[:, None] * 100.0 ** -(torch.arange(0, self.size, 2) / self.size)
            kwargs["rope"] = (angles.cos().to(device), angles.sin().to(device))
        return (qkv, self.axis), kwargs

    def bytes(self, *, backward: bool = False) -> int:
        one = self.batch * self.frames * self.places * self.heads * self.size * self.dtype.itemsize
        # q and k in and out; backward: q and k, their outputs' gradients in, two gradients out. v is a view.
        return 6 * one if backward else 4 * one

    def flops(self, *, backward: bool = False) -> int:
        values = 2 * self.batch * self.frames * self.places * self.heads * self.size
        # Norm 2 + scale 2, backward: xhat 1, weight's gradient 2, its product 1, mean 2, dx 3; rotation 3 each way.
        return ((9 if backward else 4) * self.norm + 3 * self.rope) * values


def cases() -> list[QkNormRopeCase]:
    """Projections of the full-size model (2 s clips) and of the built-in one, in float32 and bfloat16."""
    sizes: dict[str, dict[str, Any]] = {
        "spatial-512x512": {"frames": 15, "places": 1024},
        "temporal-240p": {"axis": "temporal", "frames": 15, "places": 405, "rope": True},
        "demo": {"batch": 2, "frames": 16, "places": 64, "heads": 4, "size": 32},
        "audio": {"axis": "temporal", "frames": 14, "places": 16, "rope": True},
    }
    return [
        QkNormRopeCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
