"""Calls of ada_layer_norm that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from javis.kernels.cases import OpCase


@dataclass(frozen=True, kw_only=True)
class AdaLayerNormCase(OpCase):
    """ada_layer_norm on [batch, frames * places, width]."""

    batch: int = 1
    frames: int = 1  # T
    places: int = 1  # S
    width: int = 1152  # C
    masked: bool = False  # with a frame mask, and the modulation of timestep 0
    op: str = field(default="ada_layer_norm", init=False)

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        # A mean beside zero shows a variance that cancels.
        x = normal(self.batch, self.frames * self.places, self.width) + 2
        modulation = [0.3 * normal(self.batch, self.width) for _ in range(4)]
        if not self.masked:
            return (x, *modulation[:2]), {}
        mask = torch.rand(self.batch, self.frames, generator=generator).to(device) < 0.5
        return (x, *modulation[:2]), {"shift0": modulation[2], "scale0": modulation[3], "frame_mask": mask}

    def bytes(self, *, backward: bool = False) -> int:
        tokens = self.batch * self.frames * self.places * self.width * self.dtype.itemsize
        modulation = (4 if self.masked else 2) * self.batch * self.width * self.dtype.itemsize
        # Forward: x in, y out. Backward: x and dy in, dx out; the gradients of the modulation are as small as itself.
        return 3 * tokens + 2 * modulation if backward else 2 * tokens + modulation

    def flops(self, *, backward: bool = False) -> int:
        # Per value, forward: mean 1, variance 3, normalise 2, modulate 3.
        # Backward: xhat 2, g 2, the two means 3, dx 4, the sums over tokens 3.
        return (14 if backward else 9) * self.batch * self.frames * self.places * self.width


def cases() -> list[AdaLayerNormCase]:
    """Shapes of the full-size model (2 s clips) and of the built-in one, in float32 and bfloat16."""
    sizes: dict[str, dict[str, Any]] = {
        "video-512x512": {"frames": 15, "places": 1024},
        "video-240p-masked": {"frames": 15, "places": 405, "masked": True},
        "audio-2s": {"frames": 14, "places": 16},
        "demo": {"batch": 2, "frames": 16, "places": 64, "width": 128},
    }
    return [
        AdaLayerNormCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
