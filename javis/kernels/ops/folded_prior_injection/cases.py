"""Calls of folded_prior_injection that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from javis.kernels.cases import OpCase
from javis.kernels.ops.folded_prior_injection.reference import fold_prior


@dataclass(frozen=True, kw_only=True)
class FoldedPriorCase(OpCase):
    """folded_prior_injection of [batch, tokens, heads * size] with the folded form of [batch, heads, keys, size]."""

    differentiable: ClassVar[bool] = False

    batch: int = 1
    tokens: int = 1  # N
    keys: int = 32  # M
    heads: int = 16  # H
    size: int = 72  # D
    masked: bool = False  # a different number of keys for every sample
    op: str = field(default="folded_prior_injection", init=False)

    def layer(self, *, seed: int = 0, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments of ``fold_prior``: keys, values and the two projections of one prior attention."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        width = self.heads * self.size

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype or self.dtype)

        mask = None
        if self.masked:
            kept = torch.randint(1, self.keys + 1, (self.batch, 1), generator=generator)
            mask = (torch.arange(self.keys) < kept).to(device)
        return {
            "k": normal(self.batch, self.heads, self.keys, self.size),
            "v": normal(self.batch, self.heads, self.keys, self.size),
            "q_weight": normal(width, width) * width**-0.5,
            "q_bias": normal(width),
            "out_weight": normal(width, width) * width**-0.5,
            "out_bias": normal(width),
            "mask": mask,
        }

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        generator = torch.Generator(device="cpu").manual_seed(seed + 1)
        y = torch.randn(self.batch, self.tokens, self.heads * self.size, generator=generator).to(device, self.dtype)
        return (y, *fold_prior(**self.layer(seed=seed, device=device))), {"heads": self.heads}

    def bytes(self, *, backward: bool = False) -> int:
        width, columns = self.heads * self.size, self.heads * self.keys
        # y in, result out, both matrices in; the scores need not leave the chip.
        values = 2 * self.tokens * width + 2 * width * columns
        return self.batch * (values * self.dtype.itemsize + 4 * columns)

    def flops(self, *, backward: bool = False) -> int:
        return 4 * self.batch * self.tokens * self.heads * self.size * self.heads * self.keys  # the two products


def cases() -> list[FoldedPriorCase]:
    """Shapes of the full-size model (2 s clips) and of the built-in one, in float32 and bfloat16."""
    sizes: dict[str, dict[str, Any]] = {
        "video-512x512": {"tokens": 15 * 1024},
        "video-240p": {"tokens": 15 * 405},
        "audio-2s": {"tokens": 224},
        "demo": {"batch": 2, "tokens": 1024, "keys": 8, "heads": 4, "size": 32},
    }
    return [
        FoldedPriorCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
