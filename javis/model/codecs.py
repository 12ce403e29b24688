"""Codecs between clips and latents, and the small linear ones of the built-in model.

``VideoCodec`` and ``AudioCodec`` are the protocols the pipeline works with. The built-in codecs are fixed linear patch
transforms (principal components of world clips): exact to invert in time, so they keep every event, cheap, and small.
Behind the picture's, a few convolutions may put back the colour of edges that the transform cut off.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.vocoder import LogMel, LogMelConfig


class VideoCodec(Protocol):
    """Frames <-> video latents."""

    def latent_sizes(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of the latents of a clip."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, frames, height, width] in -1..1 -> [B, C, T, H, W]."""
        ...

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """[B, C, T, H, W] -> [B, 3, frames, height, width] in -1..1."""
        ...


class AudioCodec(Protocol):
    """Waveform <-> audio latents."""

    def latent_sizes(self, samples: int) -> tuple[int, int]:
        """(T, M) of the latents of a waveform."""
        ...

    def encode(self, audio: Tensor) -> Tensor:
        """[B, samples] -> [B, C, T, M]."""
        ...

    def decode(self, latents: Tensor, samples: int, *, seeds: list[int] | None = None) -> Tensor:
        """[B, C, T, M] -> [B, samples]; ``seeds`` fixes a random start (phases) per sample."""
        ...


@dataclass(frozen=True, kw_only=True)
class PatchTransformConfig:
    """A linear transform of patches."""

    channels: int  # channels of the input
    patch: tuple[int, ...]  # patch size along each axis
    coefficients: int  # latent channels kept of channels * prod(patch)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        if not 0 < self.coefficients <= self.values:
            raise ValueError(f"coefficients {self.coefficients} must be in 1..{self.values} (values of a patch)")

    @property
    def values(self) -> int:
        return self.channels * math.prod(self.patch)


class PatchTransform(nn.Module):
    """``z = gain * (basis @ (patch - mean))`` and back. The basis has orthonormal rows.

    ``gain`` is 1/sqrt(standard deviation) per coefficient up to one factor (half whitening): between equal weight for
    every coefficient, which is mostly noise, and pixel weight, where the flow decides details only in its last steps.
    """

    mean: Tensor
    basis: Tensor
    gain: Tensor

    def __init__(self, config: PatchTransformConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.values))
        self.register_buffer("basis", torch.eye(config.coefficients, config.values))
        self.register_buffer("gain", torch.ones(config.coefficients))

    def split(self, x: Tensor) -> Tensor:
        """[B, C, *sizes] with sizes multiples of the patch -> patches [B, *grid, C * prod(patch)]."""
        patch, axes = self.config.patch, len(self.config.patch)
        for size, p in zip(x.shape[2:], patch, strict=True):
            if size % p:
                raise ValueError(f"input sizes {list(x.shape[2:])} must be multiples of the patch {patch}")
        grid = [n // p for n, p in zip(x.shape[2:], patch, strict=True)]
        x = x.reshape(*x.shape[:2], *(n for pair in zip(grid, patch, strict=True) for n in pair))
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        return x.permute(order).flatten(1 + axes)

    def join(self, patches: Tensor) -> Tensor:
        """Inverse of :meth:`split`."""
        patch, axes = self.config.patch, len(self.config.patch)
        grid = patches.shape[1:-1]
        x = patches.unflatten(-1, (self.config.channels, *patch))
        order = [0, 1 + axes] + [n for a in range(axes) for n in (1 + a, 2 + axes + a)]
        return x.permute(order).reshape(
            x.shape[0], self.config.channels, *(g * p for g, p in zip(grid, patch, strict=True))
        )

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, *sizes] -> [B, coefficients, *grid]."""
        z = (self.split(x) - self.mean) @ (self.basis * self.gain[:, None]).T
        return z.movedim(-1, 1)

    def decode(self, z: Tensor) -> Tensor:
        """[B, coefficients, *grid] -> [B, C, *sizes]."""
        return self.join(z.movedim(1, -1) @ (self.basis / self.gain[:, None]) + self.mean)

    @torch.no_grad()
    def fit(self, x: Tensor) -> Tensor:
        """Principal components of the patches of ``x`` [B, C, *sizes]; returns their shares of the variance."""
        patches = self.split(x).flatten(0, -2).double()
        self.mean.copy_(patches.mean(0))
        centred = patches - self.mean.double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        order = values.argsort(descending=True)[: self.config.coefficients]
        std = values[order].clamp(min=1e-8).sqrt()
        self.basis.copy_(vectors[:, order].T)
        gain = std.rsqrt()
        gain = gain / (gain * std).square().mean().sqrt()  # latents have unit variance on average
        self.gain.copy_(gain)
        return values[order] / values.sum()


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """Convolutions behind a linear video codec."""

    channels: int = 32  # of the hidden layers, at half the resolution

    def __post_init__(self) -> None:
        if not 0 < self.channels <= 4096:
            raise ValueError(f"refinement channels {self.channels} must be in 1..4096")


class FrameRefinement(nn.Module):
    """Adds to decoded frames what a linear transform of few coefficients cannot hold.

    Coefficients are cut off by variance, and that of small coloured edges is small: a star comes back with its
    brightness right and its colour blurred. What belongs there is seen in the frame itself, so four convolutions at
    half the resolution find it. They look at the frames of one latent together and at no others, so no event can move
    to another latent. At first nothing is added. :mod:`javis.train.refinement` trains it.
    """

    def __init__(self, config: RefinementConfig, channels: int, frames: int) -> None:
        super().__init__()
        self.config, self.frames = config, frames
        inner, outer = config.channels, 4 * channels * frames
        self.first = nn.Conv2d(outer, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, inner, 3, padding=1)
        self.third = nn.Conv2d(inner, inner, 3, padding=1)
        self.last = nn.Conv2d(inner, outer, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, frames * T, H, W] -> the same; H and W are even."""
        # One clip at a time: for a larger batch a library may choose another algorithm, and no clip may depend on that.
        return torch.stack([self._refine(clip) for clip in video])

    def _refine(self, clip: Tensor) -> Tensor:
        grouped = clip.unflatten(1, (-1, self.frames)).transpose(0, 1).flatten(1, 2)  # [T, C * frames, H, W]
        y = F.silu(self.first(F.pixel_unshuffle(grouped, 2)))
        y = F.silu(self.second(y))
        y = y + F.silu(self.third(y))
        refined = grouped + F.pixel_shuffle(self.last(y), 2)
        return refined.unflatten(1, (-1, self.frames)).transpose(0, 1).flatten(1, 2)


class PatchVideoCodec(nn.Module):
    """Linear video codec, with a refinement if asked for.

    Frames are padded to whole patches by repeating the last one and cropped again.
    """

    def __init__(self, config: PatchTransformConfig, refinement: RefinementConfig | None = None) -> None:
        super().__init__()
        self.transform = PatchTransform(config)
        self.refinement: FrameRefinement | None = None
        if refinement is not None:
            if any(side % 2 for side in config.patch[1:]):
                raise ValueError(f"a refinement works at half the resolution; the patch {config.patch} must be even")
            self.refinement = FrameRefinement(refinement, config.channels, config.patch[0])

    @property
    def config(self) -> PatchTransformConfig:
        return self.transform.config

    def latent_sizes(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        t, h, w = (-(-n // p) for n, p in zip((frames, height, width), self.config.patch, strict=True))
        return t, h, w

    def encode(self, video: Tensor) -> Tensor:
        missing = -video.shape[2] % self.config.patch[0]
        if missing:
            video = torch.cat((video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
        return self.transform.encode(video)

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        video = self.transform.decode(latents)
        if self.refinement is not None:
            video = self.refinement(video)
        return video[:, :, :frames].clamp(-1, 1)


class PatchAudioCodec(nn.Module):
    """Log-mel, then a linear patch transform; back by the transposed transform and Griffin-Lim."""

    def __init__(self, config: PatchTransformConfig, mel: LogMelConfig) -> None:
        super().__init__()
        self.transform = PatchTransform(config)
        self.mel = LogMel(mel)

    @property
    def config(self) -> PatchTransformConfig:
        return self.transform.config

    def latent_sizes(self, samples: int) -> tuple[int, int]:
        frames = -(-samples // self.mel.config.hop)
        return -(-frames // self.config.patch[0]), self.mel.config.bins // self.config.patch[1]

    def log_mel(self, audio: Tensor) -> Tensor:
        """[B, samples] -> normalised log-mel padded to whole patches, [B, 1, frames, bins]."""
        mel = self.mel.encode(audio)
        missing = -mel.shape[1] % self.config.patch[0]
        if missing:
            mel = torch.cat((mel, mel.new_full((mel.shape[0], missing, mel.shape[2]), self.mel.silence)), dim=1)
        return mel[:, None]

    def encode(self, audio: Tensor) -> Tensor:
        return self.transform.encode(self.log_mel(audio))

    def decode(self, latents: Tensor, samples: int, *, seeds: list[int] | None = None) -> Tensor:
        mel = self.transform.decode(latents)[:, 0]
        return self.mel.decode(mel, samples, seeds=seeds)


def codec_config(video: PatchVideoCodec, audio: PatchAudioCodec) -> dict[str, Any]:
    """Configuration of both codecs as written to ``config.json``."""
    facts = {"video": asdict(video.config), "audio": asdict(audio.config), "mel": asdict(audio.mel.config)}
    if video.refinement is not None:
        facts["refinement"] = asdict(video.refinement.config)
    return facts


def build_codecs(config: dict[str, Any]) -> tuple[PatchVideoCodec, PatchAudioCodec]:
    """Inverse of :func:`codec_config`; weights are loaded by the caller."""
    refinement = RefinementConfig(**config["refinement"]) if "refinement" in config else None
    video = PatchVideoCodec(PatchTransformConfig(**config["video"]), refinement)
    audio = PatchAudioCodec(PatchTransformConfig(**config["audio"]), LogMelConfig(**config["mel"]))
    return video, audio
