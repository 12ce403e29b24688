"""Calls of factorized_attention that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from javis.kernels.cases import OpCase


@dataclass(frozen=True, kw_only=True)
class FactorizedAttentionCase(OpCase):
    """Attention along ``axis`` of packed projections [batch, frames, places, 3, heads, size]."""

    axis: str = "temporal"
    batch: int = 1
    frames: int = 1  # T
    places: int = 1  # S
    heads: int = 16  # H
    size: int = 72  # D
    norm: bool = True
    rope: bool = False
    op: str = field(default="factorized_attention", init=False)

    @property
    def length(self) -> int:
        """Of the sequences."""
        return self.frames if self.axis == "temporal" else self.places

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Tensor, str], dict[str, Any]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        qkv = normal(self.batch, self.frames, self.places, 3, self.heads, self.size)
        kwargs: dict[str, Any] = {}
        if self.norm:  # weights that are no power of two, of both signs
            kwargs |= {"q_weight": 1 + 0.5 * normal(self.size), "k_weight": 1 + 0.5 * normal(self.size)}
        if self.rope:
            angles = torch.arange(self.length)[:, None] * 100.0 ** -(torch.arange(0, self.size, 2) / self.size)
            kwargs["rope"] = (angles.cos().to(device), angles.sin().to(device))
        return (qkv, self.axis), kwargs

    def bytes(self, *, backward: bool = False) -> int:
        out = self.batch * self.frames * self.places * self.heads * self.size * self.dtype.itemsize
        # Forward: q, k, v in, out out. Backward: q, k, v and dout in, dq, dk, dv out. Weights and tables are small.
        return 7 * out if backward else 4 * out

    def flops(self, *, backward: bool = False) -> int:
        # Two products of length x length x size for each head of each sequence, five in the backward pass (the scores
        # are computed again); norm, rotation and softmax are not counted.
        sequences = self.batch * self.frames * self.places // self.length * self.heads
        return (5 if backward else 2) * 2 * sequences * self.length**2 * self.size


def cases() -> list[FactorizedAttentionCase]:
    """Sequences of the full-size model (2 s clips) and of the built-in one, in float32 and bfloat16.

    Spatial attention is measured on a few frames of a clip: each costs the same, and the reference keeps all scores.
    """
    sizes: dict[str, dict[str, Any]] = {
        "temporal-512x512": {"frames": 15, "places": 1024, "rope": True},
        "temporal-240p-guided": {"batch": 2, "frames": 15, "places": 405, "rope": True},
        "temporal-8s": {"frames": 60, "places": 405, "rope": True},
        "temporal-audio": {"frames": 14, "places": 16, "rope": True},
        "temporal-demo": {"batch": 2, "frames": 16, "places": 64, "heads": 4, "size": 32, "rope": True},
        "spatial-512x512": {"axis": "spatial", "frames": 2, "places": 1024},
        "spatial-240p": {"axis": "spatial", "frames": 4, "places": 405},
        "spatial-demo": {"axis": "spatial", "batch": 2, "frames": 16, "places": 64, "heads": 4, "size": 32},
    }
    return [
        FactorizedAttentionCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
