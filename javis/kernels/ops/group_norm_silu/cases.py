"""Calls of group_norm_silu that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from javis.kernels.cases import OpCase


@dataclass(frozen=True, kw_only=True)
class GroupNormSiluCase(OpCase):
    """group_norm_silu on channels-last [batch, channels, *places]."""

    batch: int = 1
    channels: int = 128
    places: tuple[int, ...] = (64, 64)
    groups: int = 32
    op: str = field(default="group_norm_silu", init=False)
    free_last_axis: ClassVar[tuple[int, ...]] = (0,)  # any number of places is valid

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        # Channels of different means, so that joining them to groups matters.
        x = normal(self.batch, *self.places, self.channels) + 2 * normal(self.channels)
        return (x.movedim(-1, 1), self.groups, 1 + 0.3 * normal(self.channels), 0.3 * normal(self.channels)), {}

    def _values(self) -> int:
        return self.batch * self.channels * torch.Size(self.places).numel()

    def bytes(self, *, backward: bool = False) -> int:
        # Forward: x twice, y. Backward: x and dy twice, dx. (The statistics need all of x before the first y.)
        return (5 if backward else 3) * self._values() * self.dtype.itemsize

    def flops(self, *, backward: bool = False) -> int:
        # Forward: sums 4, norm 4, SiLU 4. Backward: xhat and dz 12, twice; sums 3, dx 5.
        return (32 if backward else 12) * self._values()


def cases() -> list[GroupNormSiluCase]:
    """Stages of an image decoder at 512x512, a 3D one, and a small one."""
    sizes: dict[str, dict[str, Any]] = {
        "decoder-512x512": {"channels": 128, "places": (512, 512)},
        "decoder-64x64": {"channels": 512, "places": (64, 64), "batch": 4},
        "decoder-3d": {"channels": 256, "places": (4, 64, 64)},
        "tiny": {"channels": 8, "places": (3, 5), "groups": 4},
    }
    return [
        GroupNormSiluCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
