"""Calls of gated_residual_ada_layer_norm that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from javis.kernels.cases import OpCase


@dataclass(frozen=True, kw_only=True)
class GatedResidualAdaLayerNormCase(OpCase):
    """gated_residual_ada_layer_norm on [batch, frames * places, width]."""

    batch: int = 1
    frames: int = 1  # T
    places: int = 1  # S
    width: int = 1152  # C
    gated: bool = True  # False: gate=None
    masked: bool = False  # with a frame mask, and the modulation of timestep 0
    op: str = field(default="gated_residual_ada_layer_norm", init=False)

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        tokens = (self.batch, self.frames * self.places, self.width)
        x, h = normal(*tokens) + 2, normal(*tokens)
        gate, shift, scale, gate0, shift0, scale0 = (0.3 * normal(self.batch, self.width) for _ in range(6))
        args = (x, h, gate if self.gated else None, shift, scale)
        if not self.masked:
            return args, {}
        mask = torch.rand(self.batch, self.frames, generator=generator).to(device) < 0.5
        zero = {"gate0": gate0} if self.gated else {}
        return args, zero | {"shift0": shift0, "scale0": scale0, "frame_mask": mask}

    def bytes(self, *, backward: bool = False) -> int:
        tokens = self.batch * self.frames * self.places * self.width * self.dtype.itemsize
        rows = (3 if self.gated else 2) * (2 if self.masked else 1)
        modulation = rows * self.batch * self.width * self.dtype.itemsize
        # Forward: x and h in, r and y out. Backward: dr, dy and r in, dx out; with a gate also h in and dh out.
        return (6 if self.gated else 4) * tokens + 2 * modulation if backward else 4 * tokens + modulation

    def flops(self, *, backward: bool = False) -> int:
        # Per value: those of ada_layer_norm (9 and 14), the residual 1 (gate 1), dr 1 (dgate 2, dh 1).
        gate = int(self.gated)
        per_value = 15 + 3 * gate if backward else 10 + gate
        return per_value * self.batch * self.frames * self.places * self.width


def cases() -> list[GatedResidualAdaLayerNormCase]:
    """Shapes of the full-size model (2 s clips) and of the built-in one, in float32 and bfloat16."""
    sizes: dict[str, dict[str, Any]] = {
        "video-512x512": {"frames": 15, "places": 1024},
        "video-240p-masked": {"frames": 15, "places": 405, "masked": True},
        "audio-2s": {"frames": 14, "places": 16},
        "audio-2s-no-gate": {"frames": 14, "places": 16, "gated": False},
        "demo": {"batch": 2, "frames": 16, "places": 64, "width": 128},
        "demo-masked": {"batch": 1, "frames": 4, "places": 16, "width": 128, "masked": True},
    }
    return [
        GatedResidualAdaLayerNormCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
