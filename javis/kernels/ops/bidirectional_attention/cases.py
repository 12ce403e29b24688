"""Calls of bidirectional_attention that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from javis.kernels.cases import OpCase


@dataclass(frozen=True, kw_only=True)
class BidirectionalAttentionCase(OpCase):
    """bidirectional_attention of [batch, video, width] with [batch, audio, width]."""

    batch: int = 1
    video: int = 1  # Nv
    audio: int = 1  # Na
    heads: int = 8  # H
    size: int = 72  # D
    op: str = field(default="bidirectional_attention", init=False)

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def normal(tokens: int) -> Tensor:
            x = torch.randn(self.batch, tokens, self.heads * self.size, generator=generator)
            return x.to(device, self.dtype)

        tensors = (normal(self.video), normal(self.audio), normal(self.video), normal(self.audio))
        return (*tensors, self.heads), {}

    def bytes(self, *, backward: bool = False) -> int:
        # Forward: q and v of both streams in, one result each out. Backward: q, v, result and its gradient in, the
        # gradients of q and v out.
        values = self.batch * (self.video + self.audio) * self.heads * self.size
        return (6 if backward else 3) * values * self.dtype.itemsize

    def flops(self, *, backward: bool = False) -> int:
        # Products of Nv * Na * D multiply-adds. Forward: the scores, and values of either side. Backward: the scores
        # again, the gradients of both probabilities, and those of both q and both v. The softmaxes are left out.
        products = 7 if backward else 3
        return 2 * products * self.batch * self.heads * self.video * self.audio * self.size


def cases() -> list[BidirectionalAttentionCase]:
    """Shapes of the full-size model (2 s clips) and of the built-in one, in float32 and bfloat16."""
    sizes: dict[str, dict[str, Any]] = {
        "512x512-2s": {"video": 15360, "audio": 224},
        "240p-2s": {"video": 6075, "audio": 224},
        "demo": {"batch": 2, "video": 256, "audio": 128, "heads": 2, "size": 32},
    }
    return [
        BidirectionalAttentionCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
