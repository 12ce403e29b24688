"""A small codec of the official architecture, with random weights in every place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from javis.model.vae_temporal import TemporalVAE, TemporalVAEConfig, VideoVAE

diffusers = pytest.importorskip("diffusers", reason="the full-size codec needs diffusers: pip install 'javis[full]'")
WIDTHS, LAYERS, GROUPS, SCALING = (8, 8, 16, 24), 1, 4, 0.18215
SHIFT, SCALE = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)


class ImageVAE:
    """The library's decode, frame by frame: what the fast one is held against."""

    space_factor, scaling_factor = 8, SCALING

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latent_dist.mode() * self.scaling_factor

    def decode(self, features: Tensor) -> Tensor:
        return torch.cat([self.vae.decode(frame / self.scaling_factor).sample for frame in features.split(1)])


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Norms and biases too, which start where mistakes do not show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(noise * 0.3 + (parameter != 0))


def make_autoencoder(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    levels = len(changes.get("block_out_channels", WIDTHS))
    settings: dict[str, Any] = {
        "block_out_channels": WIDTHS, "layers_per_block": LAYERS, "norm_num_groups": GROUPS,
        "up_block_types": ["UpDecoderBlock2D"] * levels, "down_block_types": ["DownEncoderBlock2D"] * levels,
        "scaling_factor": SCALING, "sample_size": 64,
    }  # fmt: skip
    vae = diffusers.AutoencoderKL(**(settings | changes)).eval().requires_grad_(False)
    randomise(vae)
    return torch.nn.Module.to(vae, dtype)  # diffusers' own warns


def make_temporal(dtype: torch.dtype = torch.float64) -> TemporalVAE:
    vae = TemporalVAE(TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=GROUPS)).eval().requires_grad_(False)
    randomise(vae, 1)
    return vae.to(dtype)


def make_codec(dtype: torch.dtype = torch.float64) -> VideoVAE:
    """Plain codec in ``dtype``; equal weights, rounded to bfloat16, in each."""
    image, temporal = make_autoencoder(torch.bfloat16), make_temporal(torch.bfloat16)
    codec = VideoVAE(temporal.to(dtype), shift=SHIFT, scale=SCALE, image_vae=ImageVAE(image.to(dtype)))
    return codec.double() if dtype == torch.float64 else codec


def latents(frames: int, height: int, width: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Normalised latents in float32, of windows of 17 frames."""
    count = frames // 17 * 5 + -(-(frames % 17) // 4)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, count, height, width, generator=generator)
