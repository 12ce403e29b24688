"""Calls of gated_residual_ada_layer_norm_fp8 that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from javis.kernels.ops.ada_layer_norm_fp8.cases import SIZES
from javis.kernels.ops.gated_residual_ada_layer_norm.cases import GatedResidualAdaLayerNormCase


@dataclass(frozen=True, kw_only=True)
class GatedResidualAdaLayerNormFp8Case(GatedResidualAdaLayerNormCase):
    """gated_residual_ada_layer_norm_fp8 on [batch, frames * places, width]."""

    static: bool = False  # one scale for the tensor is given; otherwise one per row is computed
    op: str = field(default="gated_residual_ada_layer_norm_fp8", init=False)
    differentiable: ClassVar[bool] = False

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        args, kwargs = super().inputs(seed=seed, device=device)
        return (*args, torch.tensor(6.0 / 448, device=device) if self.static else None), kwargs

    def bytes(self, *, backward: bool = False) -> int:
        tokens = self.batch * self.frames * self.places
        scales = 4 if self.static else 4 * tokens
        return super().bytes() - tokens * self.width * (self.dtype.itemsize - 1) + scales  # y is one byte a value

    def flops(self, *, backward: bool = False) -> int:
        values = self.batch * self.frames * self.places * self.width
        return super().flops() + (3 if self.static else 4) * values  # scale and clamp; the maximum of the row


def cases() -> list[GatedResidualAdaLayerNormFp8Case]:
    """The sizes of ada_layer_norm_fp8 in float32 and bfloat16."""
    return [
        GatedResidualAdaLayerNormFp8Case(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in SIZES.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
