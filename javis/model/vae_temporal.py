"""Temporal video VAE: compresses the features of an image VAE in time, and the chunked pipeline around both.

The official video latents come from an image VAE (8x8 in space) followed by this one (4x in time), applied to chunks
of 17 frames one by one, so that memory does not grow with the clip. Convolutions are causal in time.

Shapes: B batch, C channels, T time, H and W space. Parameter names are those of the official VAE_Temporal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class TemporalVAEConfig:
    """Sizes of :class:`TemporalVAE`; the defaults are the official ones."""

    in_out_channels: int = 4  # channels of the image VAE's features
    latent_embed_dim: int = 4  # channels inside, between the 1x1x1 convolutions
    embed_dim: int = 4  # channels of the latents
    filters: int = 128  # base width
    num_res_blocks: int = 4  # residual blocks per level
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)  # width of each level / filters
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # halve the time after level i?
    num_groups: int = 32  # of the group norms

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "temporal_downsample", tuple(self.temporal_downsample))
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"{len(self.channel_multipliers)} levels have {len(self.channel_multipliers) - 1} places to downsample "
                f"between them, got {len(self.temporal_downsample)} in temporal_downsample"
            )
        if any(width % self.num_groups for width in self.widths):
            raise ValueError(f"the widths {self.widths} must be divisible by num_groups {self.num_groups}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, (128, 256, 256, 512) officially."""
        return tuple(self.filters * multiplier for multiplier in self.channel_multipliers)

    @property
    def time_factor(self) -> int:
        """Frames per latent frame, 4 officially."""
        return 2 ** sum(self.temporal_downsample)

    @classmethod
    def from_official(cls, values: dict[str, Any]) -> TemporalVAEConfig:
        """Take the constructor arguments of the official VAE_Temporal; what has no meaning here is ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


class Posterior(NamedTuple):
    """Diagonal normal distribution of latents, each [B, C, T, H, W]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``mean + exp(logvar / 2) * noise``; the noise is drawn from ``generator`` unless given."""
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)


class CausalConv3d(nn.Module):
    """Convolution with zeros before the first frame (never after the last) and around each frame."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.front = kernel - stride  # kernel - 1 of causality, less what a stride that starts at frame 0 skips
        self.side = kernel // 2
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T // stride, H, W]."""
        return self.conv(F.pad(x, (self.side, self.side, self.side, self.side, self.front, 0)))


class ResBlock(nn.Module):
    """Group norm, SiLU, convolution, twice; a 1x1x1 convolution on the shortcut where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, channels_in)
        self.conv1 = CausalConv3d(channels_in, channels_out, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, channels_out)
        self.conv2 = CausalConv3d(channels_out, channels_out, 3, bias=False)
        self.conv3 = CausalConv3d(channels_in, channels_out, 1, bias=False) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv3 is None else self.conv3(x))


def res_blocks(channels_in: int, channels_out: int, config: TemporalVAEConfig) -> nn.Sequential:
    """The residual blocks of one level; the first one changes the width."""
    widths = [channels_in] + [channels_out] * config.num_res_blocks
    return nn.Sequential(*(ResBlock(a, b, config.num_groups) for a, b in pairwise(widths)))


class Encoder(nn.Module):
    """Features -> moments of the latents before ``quant_conv``."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        before = (config.filters, *widths[:-1])
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList([res_blocks(a, b, config) for a, b in zip(before, widths, strict=True)])
        self.conv_blocks = nn.ModuleList(
            [
                CausalConv3d(width, width, 3, stride=2) if down else nn.Identity()
                for width, down in zip(widths, config.temporal_downsample, strict=False)
            ]
        )
        self.res_blocks = res_blocks(widths[-1], widths[-1], config)
        self.norm1 = nn.GroupNorm(config.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = blocks(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        x = self.res_blocks(x)
        return self.conv2(F.silu(self.norm1(x)))


class Decoder(nn.Module):
    """Latents after ``post_quant_conv`` -> features. Levels run from the last to the first."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        after = (*widths[1:], widths[-1])  # width of the level above, which comes first
        self.conv1 = CausalConv3d(config.latent_embed_dim, widths[-1], 3)
        self.res_blocks = res_blocks(widths[-1], widths[-1], config)
        self.block_res_blocks = nn.ModuleList([res_blocks(a, b, config) for a, b in zip(after, widths, strict=True)])
        self.conv_blocks = nn.ModuleList(
            [
                CausalConv3d(width, 2 * width, 3) if up else nn.Identity()
                for width, up in zip(widths[1:], config.temporal_downsample, strict=True)
            ]
        )
        self.upsample = config.temporal_downsample
        self.norm1 = nn.GroupNorm(config.num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level > 0:
                x = self.conv_blocks[level - 1](x)
                if self.upsample[level - 1]:
                    x = channels_to_time(x)
        return self.conv_out(F.silu(self.norm1(x)))


def channels_to_time(x: Tensor, factor: int = 2) -> Tensor:
    """[B, C * factor, T, H, W] -> [B, C, T * factor, H, W]; the factor is the fast axis of the channels."""
    x = x.unflatten(1, (-1, factor)).transpose(2, 3)
    return x.flatten(2, 3)


class TemporalVAE(nn.Module):
    """Image features [B, C, T, H, W] <-> latents [B, E, ceil(T / factor), H, W]."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = Decoder(config)

    def padding(self, num_frames: int) -> int:
        """Zero frames put in front, and dropped again after decoding, to fill the first latent frame."""
        return -num_frames % self.config.time_factor

    def encode(self, x: Tensor) -> Posterior:
        """Posterior of the latents of features [B, C, T, H, W]."""
        x = F.pad(x, (0, 0, 0, 0, self.padding(x.shape[2]), 0))
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Features [B, C, num_frames, H, W] of latents [B, E, ceil(num_frames / factor), H, W]."""
        latents = -(-num_frames // self.config.time_factor)
        if z.shape[2] != latents or num_frames < 1:
            raise ValueError(f"{num_frames} frames have {latents} latent frames, got {z.shape[2]}")
        return self.decoder(self.post_quant_conv(z))[:, :, self.padding(num_frames) :]


class ImageVAE(Protocol):
    """What the pipeline needs of the VAE that works frame by frame."""

    space_factor: int  # pixels per feature, along each side

    def encode(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in -1..1 -> features [N, C, H / factor, W / factor]."""

    def decode(self, features: Tensor) -> Tensor:
        """Inverse of encode."""


class VideoVAE(nn.Module):
    """Image VAE and temporal VAE in chunks of frames, with normalised latents.

    Args:
        temporal: the temporal VAE.
        shift, scale: per channel of the latents, or one for all; normalised latents are ``(z - shift) / scale``.
        micro_frame_size: frames of a chunk, each encoded as if it stood alone; None: the whole clip at once.
        image_vae: the VAE in space, None for features that come from elsewhere.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        temporal: TemporalVAE,
        *,
        shift: Sequence[float] | float = 0.0,
        scale: Sequence[float] | float = 1.0,
        micro_frame_size: int | None = 17,
        image_vae: ImageVAE | None = None,
    ) -> None:
        super().__init__()
        if micro_frame_size is not None and micro_frame_size < 1:
            raise ValueError(f"micro_frame_size must be positive or None, got {micro_frame_size}")
        self.temporal = temporal
        self.image_vae = image_vae
        self.micro_frame_size = micro_frame_size
        channels = temporal.config.embed_dim
        for name, value in (("shift", shift), ("scale", scale)):
            vector = torch.as_tensor(value, dtype=torch.float32).reshape(-1).expand(channels).clone()
            self.register_buffer(name, vector[None, :, None, None, None], persistent=False)

    def _chunks(self, num_frames: int) -> list[int]:
        """Lengths of the chunks of a clip; the last one may be short."""
        if num_frames < 1:
            raise ValueError(f"a clip has at least one frame, got {num_frames}")
        size = self.micro_frame_size or num_frames
        return [min(size, num_frames - start) for start in range(0, num_frames, size)]

    def _latent_frames(self, num_frames: int) -> int:
        """Latent frames of one chunk."""
        return -(-num_frames // self.temporal.config.time_factor)

    def latent_size(
        self, size: tuple[int | None, int | None, int | None], *, space_factor: int | None = None
    ) -> tuple[int | None, int | None, int | None]:
        """(T, H, W) of the latents of a clip of (T, H, W) frames and pixels; None stays None.

        ``space_factor`` defaults to that of the image VAE (1 without one); incomplete latents are cut off in space.
        """
        factor = space_factor or (1 if self.image_vae is None else self.image_vae.space_factor)
        frames, height, width = size
        return (
            None if frames is None else sum(self._latent_frames(n) for n in self._chunks(frames)),
            None if height is None else height // factor,
            None if width is None else width // factor,
        )

    def encode(self, x: Tensor, *, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Sampled, normalised latents.

        Args:
            x: frames [B, 3, T, H, W] in -1..1, or features [B, C, T, H, W] without an image VAE.
            noise: standard normal with the shape of the latents; None draws it chunk by chunk.
            generator: source of the noise.
        """
        x = self._per_frame(x, encode=True)
        lengths = self._chunks(x.shape[2])
        pieces = []
        noises = noise.split([self._latent_frames(n) for n in lengths], dim=2) if noise is not None else None
        for i, chunk in enumerate(x.split(lengths, dim=2)):
            pieces.append(self.temporal.encode(chunk).sample(noises[i] if noises else None, generator))
        return (torch.cat(pieces, dim=2) - self.shift) / self.scale

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Frames (features without an image VAE) [B, C, num_frames, H, W] of normalised latents [B, E, T', H, W]."""
        z = z * self.scale.to(z) + self.shift.to(z)
        lengths = self._chunks(num_frames)
        latents = [self._latent_frames(n) for n in lengths]
        if z.shape[2] != sum(latents):
            raise ValueError(f"{num_frames} frames have {sum(latents)} latent frames, got {z.shape[2]}")
        pieces = [self.temporal.decode(chunk, n) for chunk, n in zip(z.split(latents, dim=2), lengths, strict=True)]
        return self._per_frame(torch.cat(pieces, dim=2), encode=False)

    def _per_frame(self, x: Tensor, *, encode: bool) -> Tensor:
        """Run the image VAE, if there is one, on every frame of [B, C, T, H, W]."""
        if self.image_vae is None:
            return x
        run = self.image_vae.encode if encode else self.image_vae.decode
        images = x.transpose(1, 2).flatten(0, 1)
        return run(images).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
