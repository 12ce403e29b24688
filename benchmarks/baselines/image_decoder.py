"""The decoder of diffusers' ``AutoencoderKL`` in plain PyTorch, under its names, for machines without diffusers.

What `benchmarks/decode.py` measures our decode against: the eager computation as the library does it, layer by layer.
A test holds it to the library with the same weights, and shows that the results are equal to the bit.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.time_emb_proj = None
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class Attention(nn.Module):
    heads, rescale_output_factor, residual_connection = 1, 1.0, True

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (project(y).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return y.transpose(-1, -2).reshape(x.shape) + x


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups) for a, b in pairwise(widths)])
        self.upsamplers = None if last else nn.ModuleList([Upsample(channels_out)])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *(self.upsamplers or ())):
            x = module(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Decoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], layers: int, latent_channels: int, groups: int) -> None:
        super().__init__()
        turned = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, turned[0], 3, padding=1)
        self.mid_block = Middle(turned[0], groups)
        levels = zip((turned[0], *turned[:-1]), turned)
        self.up_blocks = nn.ModuleList(
            [Level(a, b, layers + 1, groups, i == len(widths) - 1) for i, (a, b) in enumerate(levels)]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderDecoder(nn.Module):
    """The half of an ``AutoencoderKL`` that decodes; the defaults are Stable Diffusion's."""

    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        latent_channels: int = 4,
    ) -> None:
        super().__init__()
        self.config: Any = {
            "block_out_channels": block_out_channels, "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups, "latent_channels": latent_channels, "out_channels": 3,
            "up_block_types": ("UpDecoderBlock2D",) * len(block_out_channels), "scaling_factor": 0.18215,
        }  # fmt: skip
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(block_out_channels, layers_per_block, latent_channels, norm_num_groups)

    @torch.no_grad()
    def decode(self, z: Tensor) -> SimpleNamespace:
        """As the library's: the frames are under ``sample``."""
        return SimpleNamespace(sample=self.decoder(self.post_quant_conv(z)))
