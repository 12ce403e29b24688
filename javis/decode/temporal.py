"""The decoder of `TemporalVAE` on several windows at once, channels-last, with fused norms.

The windows of 17 frames are decoded as if each stood alone, so they can share a batch: group norms have statistics of
their own for each sample. `javis.model.vae_temporal.Decoder` states the same computation plainly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.decode.image import Norm
from javis.decode.ops import NormSilu, placed
from javis.model.vae_temporal import CausalConv3d, TemporalVAE


@dataclass(frozen=True)
class CausalConv:
    """A convolution that sees ``front`` frames before the current one and none after it."""

    weight: Tensor
    bias: Tensor | None
    front: int


@dataclass(frozen=True)
class TemporalResBlock:
    """As `javis.model.vae_temporal.ResBlock`."""

    norm1: Norm
    conv1: CausalConv
    norm2: Norm
    conv2: CausalConv
    shortcut: CausalConv | None


@dataclass(frozen=True)
class DoubleTime:
    """A convolution to twice the channels, which then become twice the frames."""

    conv: CausalConv


@dataclass(frozen=True)
class TemporalOutput:
    """Group norm, SiLU, convolution."""

    norm: Norm
    conv: CausalConv


TemporalStep: TypeAlias = CausalConv | TemporalResBlock | DoubleTime | TemporalOutput


def prepare_temporal(vae: TemporalVAE, dtype: torch.dtype) -> list[TemporalStep]:
    """The steps of ``vae.decode``, with weights as in `javis.decode.image.prepare`."""
    decoder = vae.decoder

    def conv(module: CausalConv3d) -> CausalConv:
        weight = placed(module.conv.weight, dtype)
        return CausalConv(
            weight, None if module.conv.bias is None else module.conv.bias.detach().to(dtype), module.front
        )

    def norm(module: nn.GroupNorm) -> Norm:
        return Norm(module.num_groups, module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)

    def blocks(modules: Any) -> list[TemporalStep]:
        return [
            TemporalResBlock(
                norm(b.norm1), conv(b.conv1), norm(b.norm2), conv(b.conv2), None if b.conv3 is None else conv(b.conv3)
            )
            for b in modules
        ]

    steps: list[TemporalStep] = [conv(vae.post_quant_conv), conv(decoder.conv1), *blocks(decoder.res_blocks)]
    for level in reversed(range(len(decoder.block_res_blocks))):
        steps += blocks(decoder.block_res_blocks[level])
        if level > 0 and decoder.upsample[level - 1]:
            steps.append(DoubleTime(conv(decoder.conv_blocks[level - 1])))  # type: ignore[arg-type]
    return [*steps, TemporalOutput(norm(decoder.norm1), conv(decoder.conv_out))]


def causal_conv(x: Tensor, conv: CausalConv) -> Tensor:
    """[B, C, T, H, W] -> [B, C', T, H, W]. Only the frames before the first are made; the sides are the library's."""
    if conv.front:
        x = F.pad(x, (0, 0, 0, 0, conv.front, 0))
    side = conv.weight.shape[-1] // 2
    return F.conv3d(x, conv.weight, conv.bias, padding=(0, side, side))


def double_time(x: Tensor) -> Tensor:
    """[B, 2 C, T, H, W] -> [B, C, 2 T, H, W], factor fastest in the channels; channels-last stays so, in one copy."""
    batch, channels, frames, height, width = x.shape
    places = x.permute(0, 2, 3, 4, 1).unflatten(-1, (channels // 2, 2))  # [B, T, H, W, C, 2]
    doubled = places.permute(0, 1, 5, 2, 3, 4).reshape(batch, 2 * frames, height, width, channels // 2)
    return doubled.permute(0, 4, 1, 2, 3)


def run_temporal_step(step: TemporalStep, x: Tensor, norm_silu: NormSilu) -> Tensor:
    """One step. ``x`` [B, C, T, H, W] channels-last may be overwritten by the result."""
    if isinstance(step, CausalConv):
        return causal_conv(x, step)
    if isinstance(step, DoubleTime):
        return double_time(causal_conv(x, step.conv))
    if isinstance(step, TemporalOutput):
        return causal_conv(norm_silu(x, *step.norm.arguments), step.conv)
    h = causal_conv(norm_silu(x, *step.norm1.arguments), step.conv1)
    y = norm_silu(h, *step.norm2.arguments)
    del h
    h = causal_conv(y, step.conv2)
    del y
    return x.add_(h) if step.shortcut is None else h.add_(causal_conv(x, step.shortcut))


@torch.no_grad()
def decode_windows(steps: list[TemporalStep], latents: Tensor, frames: int, norm_silu: NormSilu) -> Tensor:
    """Latents [B, E, T', H, W] of equally long windows -> features [B, C, frames, H, W], the last of each."""
    first = steps[0]
    assert isinstance(first, CausalConv)
    x = latents.to(first.weight.dtype, memory_format=torch.channels_last_3d)
    for step in steps:
        x = run_temporal_step(step, x, norm_silu)
    return x[:, :, x.shape[2] - frames :]
