"""Calls of ada_layer_norm_fp8 that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from javis.kernels.ops.ada_layer_norm.cases import AdaLayerNormCase


@dataclass(frozen=True, kw_only=True)
class AdaLayerNormFp8Case(AdaLayerNormCase):
    """ada_layer_norm_fp8 on [batch, frames * places, width]."""

    static: bool = False  # one scale for the tensor is given; otherwise one per row is computed
    op: str = field(default="ada_layer_norm_fp8", init=False)
    differentiable: ClassVar[bool] = False

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        args, kwargs = super().inputs(seed=seed, device=device)
        return (*args, torch.tensor(6.0 / 448, device=device) if self.static else None), kwargs

    def bytes(self, *, backward: bool = False) -> int:
        values = self.batch * self.frames * self.places * self.width
        modulation = (4 if self.masked else 2) * self.batch * self.width * self.dtype.itemsize
        scales = 4 if self.static else 4 * self.batch * self.frames * self.places
        return values * (self.dtype.itemsize + 1) + modulation + scales

    def flops(self, *, backward: bool = False) -> int:
        values = self.batch * self.frames * self.places * self.width
        return super().flops() + (3 if self.static else 4) * values  # scale and clamp; the maximum of the row


# Of both norms with float8 output: shapes of the full-size model (2 s clips) and of the built-in one.
SIZES: dict[str, dict[str, Any]] = {
    "video-512x512-rows": {"frames": 15, "places": 1024},
    "video-512x512-static": {"frames": 15, "places": 1024, "static": True},
    "video-240p-masked-rows": {"frames": 15, "places": 405, "masked": True},
    "demo-rows": {"batch": 2, "frames": 16, "places": 64, "width": 128},
    "demo-masked-static": {"frames": 4, "places": 16, "width": 128, "masked": True, "static": True},
}


def cases() -> list[AdaLayerNormFp8Case]:
    """``SIZES`` in float32 and bfloat16."""
    return [
        AdaLayerNormFp8Case(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in SIZES.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
