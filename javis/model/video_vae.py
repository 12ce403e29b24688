"""Video codec of the full-size pipeline: the Open-Sora VAE 1.2, an image VAE per frame and a temporal VAE after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from javis.model.parts import config_from_dict, config_to_dict, library
from javis.model.vae_temporal import TemporalVAE, TemporalVAEConfig, VideoVAE


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of a ``diffusers.AutoencoderKL``, under its names; the defaults are the image VAE's of Stable Diffusion."""

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # width of each level; all but the last halve the size
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 1024  # of the training images; for information
    scaling_factor: float = 0.18215  # latents are those of the encoder times this

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_dict(self) -> dict[str, Any]:
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AutoencoderConfig:
        return config_from_dict(cls, values)

    @classmethod
    def from_library(cls, values: dict[str, Any], **changes: Any) -> AutoencoderConfig:
        """Take the ``config.json`` of a ``diffusers.AutoencoderKL``; what has no meaning here is ignored."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
        return cls.from_dict(known | changes)

    def to_library(self) -> dict[str, Any]:
        """Arguments of ``diffusers.AutoencoderKL``."""
        levels = len(self.block_out_channels)
        return {
            **self.to_dict(),
            "out_channels": self.in_channels,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }

    def build(self) -> Any:
        """The ``diffusers.AutoencoderKL``, with random weights.

        Raises:
            UsageError: ``diffusers`` is not installed.
        """
        return library("diffusers").AutoencoderKL(**self.to_library()).eval()


@dataclass(frozen=True, kw_only=True)
class OpenSoraVideoCodecConfig:
    """Parts of :class:`OpenSoraVideoCodec`; the defaults are the Open-Sora VAE 1.2."""

    # The image weights are those of SDXL's VAE, whose own factor is 0.13025; Open-Sora was trained with 0.18215.
    image: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)  # per channel of the latents: (z - shift) / scale
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)
    micro_frame_size: int | None = 17  # frames that are coded together in time
    micro_batch_size: int = 4  # frames that pass through the image VAE at once

    def __post_init__(self) -> None:
        if self.image.latent_channels != self.temporal.in_out_channels:
            raise ValueError(
                f"the image VAE gives {self.image.latent_channels} channels, the temporal VAE takes "
                f"{self.temporal.in_out_channels}"
            )
        for name, values in (("shift", self.shift), ("scale", self.scale)):
            if len(values) != self.temporal.embed_dim:
                raise ValueError(f"{name} needs {self.temporal.embed_dim} values, one per channel, got {len(values)}")
        if self.micro_batch_size < 1 or (self.micro_frame_size is not None and self.micro_frame_size < 1):
            raise ValueError("micro_batch_size and micro_frame_size must be positive")

    def to_dict(self) -> dict[str, Any]:
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OpenSoraVideoCodecConfig:
        values = dict(values)
        for name, part in (("image", AutoencoderConfig), ("temporal", TemporalVAEConfig)):
            if name in values:
                values[name] = config_from_dict(part, values[name])
        return config_from_dict(cls, values)

    @classmethod
    def toy(cls) -> OpenSoraVideoCodecConfig:
        """The same architecture, tiny."""
        image = AutoencoderConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
        temporal = TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=4)
        return cls(image=image, temporal=temporal)


class DiffusersImageVAE:
    """A ``diffusers.AutoencoderKL`` as the ``ImageVAE`` of :class:`javis.model.vae_temporal.VideoVAE`.

    Args:
        vae: the autoencoder; the caller keeps it as a submodule.
        scaling_factor: features are the encoder's latents times this.
        space_factor: pixels per feature, along each side.
        micro_batch_size: images that are coded at once.
    """

    def __init__(self, vae: Any, *, scaling_factor: float, space_factor: int, micro_batch_size: int = 4) -> None:
        self.vae, self.scaling_factor, self.space_factor = vae, scaling_factor, space_factor
        self.micro_batch_size = micro_batch_size

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[N, 3, H, W] in -1..1 -> features [N, C, H // factor, W // factor].

        The mean of the posterior; with a generator a sample of it.
        """
        pieces = []
        for batch in images.split(self.micro_batch_size):
            posterior = self.vae.encode(batch).latent_dist
            pieces.append(posterior.mode() if generator is None else posterior.sample(generator))
        return torch.cat(pieces) * self.scaling_factor

    def decode(self, features: Tensor) -> Tensor:
        """[N, C, h, w] -> images [N, 3, h * factor, w * factor], about -1..1, not clamped."""
        batches = (features / self.scaling_factor).split(self.micro_batch_size)
        return torch.cat([self.vae.decode(batch).sample for batch in batches])


class OpenSoraVideoCodec(nn.Module):
    """Frames <-> the video latents of the official JavisDiT.

    ``image`` is a ``diffusers.AutoencoderKL``, ``temporal`` a :class:`TemporalVAE`: those are the prefixes of the state
    dict. Every 17 frames become 5 latent frames, a remainder of n becomes ceil(n / 4); 8x8 pixels become one latent.

    Raises:
        UsageError: ``diffusers`` is not installed.
    """

    def __init__(self, config: OpenSoraVideoCodecConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or OpenSoraVideoCodecConfig()
        self.image = c.image.build()
        self.temporal = TemporalVAE(c.temporal).eval()
        self._normalised: dict[torch.device, VideoVAE] = {}

    @property
    def frame_window(self) -> int:
        """Frames that are coded together: whole windows are what the official weights were trained on."""
        return self.config.micro_frame_size or 1

    @property
    def space_factor(self) -> int:
        """Pixels per latent, along each side."""
        return self.config.image.factor

    @property
    def image_vae(self) -> DiffusersImageVAE:
        """The image VAE as the frame-wise part of the codec."""
        c = self.config
        return DiffusersImageVAE(
            self.image,
            scaling_factor=c.image.scaling_factor,
            space_factor=c.image.factor,
            micro_batch_size=c.micro_batch_size,
        )

    @property
    def temporal_vae(self) -> VideoVAE:
        """Windows of frames, temporal VAE and normalisation: features <-> latents."""
        device = next(self.temporal.parameters()).device
        if device not in self._normalised:  # the constants lie where the weights do, and are no part of the state dict
            c = self.config
            vae = VideoVAE(self.temporal, shift=c.shift, scale=c.scale, micro_frame_size=c.micro_frame_size)
            self._normalised[device] = vae.to(device).eval()
        return self._normalised[device]

    def latent_sizes(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of the latents; pixels beyond a multiple of 8 are lost."""
        t, h, w = self.temporal_vae.latent_size((frames, height, width), space_factor=self.config.image.factor)
        assert t is not None and h is not None and w is not None
        return t, h, w

    @torch.no_grad()
    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """[B, 3, frames, height, width] in -1..1 -> latents [B, C, T, H, W], in the dtype of the weights.

        Args:
            video: frames.
            generator: samples both posteriors with it, as the official code does; None takes their means.
        """
        batch, frames = video.shape[0], video.shape[2]
        images = video.to(self._dtype()).transpose(1, 2).flatten(0, 1)
        features = self.image_vae.encode(images, generator)
        features = features.unflatten(0, (batch, frames)).transpose(1, 2)
        noise = None
        if generator is None:
            t, h, w = self.latent_sizes(frames, video.shape[3], video.shape[4])
            noise = features.new_zeros(batch, self.config.temporal.embed_dim, t, h, w)
        return self.temporal_vae.encode(features, noise=noise, generator=generator).to(self._dtype())

    @torch.no_grad()
    def decode_features(self, latents: Tensor, frames: int) -> Tensor:
        """Latents [B, C, T, H, W] -> features of every frame [B, 4, frames, H, W]: the temporal half of :meth:`decode`.

        Raises:
            ValueError: the latents are not those of so many frames.
        """
        return self.temporal_vae.decode(latents.to(self._dtype()), frames)

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """[B, C, T, H, W] -> exactly ``frames`` frames [B, 3, frames, 8 H, 8 W], clamped to -1..1.

        Raises:
            ValueError: the latents are not those of so many frames.
        """
        features = self.decode_features(latents, frames)
        images = self.image_vae.decode(features.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (len(latents), frames)).transpose(1, 2).clamp(-1, 1)

    def _dtype(self) -> torch.dtype:
        return next(self.temporal.parameters()).dtype
