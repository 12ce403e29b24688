"""Calls of flow_update that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from javis.kernels.cases import OpCase


@dataclass(frozen=True, kw_only=True)
class FlowUpdateCase(OpCase):
    """flow_update on latents of one size; ``dtype`` is that of the velocities, the latents are float32 or wider."""

    batch: int = 1
    video: tuple[int, int, int, int] = (4, 15, 64, 64)  # C, T, H, W
    audio: tuple[int, int, int] = (8, 52, 64)  # C, T, M
    guided: bool = True
    masked: bool = False
    more_channels: bool = True  # velocities with twice the channels, as the full-size model predicts
    op: str = field(default="flow_update", init=False)
    differentiable: ClassVar[bool] = False

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        state = torch.promote_types(self.dtype, torch.float32)

        def normal(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        def velocity(channels: int, *rest: int) -> Tensor:
            return normal(self.dtype, self.batch * (1 + self.guided), channels * (1 + self.more_channels), *rest)

        latents = (normal(state, self.batch, *self.video), normal(state, self.batch, *self.audio))
        velocities = (velocity(*self.video), velocity(*self.audio))
        dt = torch.tensor(1 / 30, dtype=state, device=device)
        scales = (7.0, 4.0) if self.guided else (1.0, 1.0)
        masks = {}
        if self.masked:
            for name, frames in (("video_mask", self.video[1]), ("audio_mask", self.audio[1])):
                masks[name] = torch.rand(self.batch, frames, generator=generator).to(device) < 0.5
        return (*latents, *velocities, dt, *scales), masks

    def _values(self) -> int:
        return self.batch * (torch.Size(self.video).numel() + torch.Size(self.audio).numel())

    def bytes(self, *, backward: bool = False) -> int:
        # Latents in and out; of the velocities only the channels that count.
        state = torch.promote_types(self.dtype, torch.float32).itemsize
        return self._values() * (2 * state + (1 + self.guided) * self.dtype.itemsize)

    def flops(self, *, backward: bool = False) -> int:
        return self._values() * (5 if self.guided else 2)


def cases() -> list[FlowUpdateCase]:
    """Latents of the full-size model (2 s clips) and of the built-in one, with velocities in float32 and bfloat16."""
    sizes: dict[str, dict[str, Any]] = {
        "720p": {"video": (4, 15, 90, 160)},
        "512x512": {},
        "512x512-masked": {"masked": True},
        "demo": {"batch": 2, "video": (4, 16, 8, 8), "audio": (8, 16, 16), "more_channels": False},
        "tiny": {"video": (2, 2, 3, 3), "audio": (2, 3, 4), "guided": False, "masked": True, "more_channels": False},
    }
    return [
        FlowUpdateCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
