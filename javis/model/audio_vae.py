"""Audio codec of the full-size pipeline: log-mel, the VAE of AudioLDM2 (Liu et al., 2023), and a HiFi-GAN vocoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.mel import LENGTH_MULTIPLE, MelConfig, log_mel_spectrogram, peak_normalize
from javis.model.parts import config_from_dict, config_to_dict, library
from javis.model.video_vae import AutoencoderConfig

AUDIOLDM2_VAE = AutoencoderConfig(
    in_channels=1, latent_channels=8, block_out_channels=(128, 256, 512), scaling_factor=0.4110932946205139
)


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """Sizes of a ``transformers.SpeechT5HifiGan``, under its names; the defaults are AudioLDM2's."""

    model_in_dim: int = 64  # mel bins
    sampling_rate: int = 16000  # Hz
    upsample_initial_channel: int = 1024
    upsample_rates: tuple[int, ...] = (5, 4, 2, 2, 2)  # their product is the hop of the mel frames
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 8, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    leaky_relu_slope: float = 0.1
    normalize_before: bool = False

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates)

    def to_dict(self) -> dict[str, Any]:
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VocoderConfig:
        return config_from_dict(cls, values)

    @classmethod
    def from_library(cls, values: dict[str, Any], **changes: Any) -> VocoderConfig:
        """Take the ``config.json`` of a ``transformers.SpeechT5HifiGan``; what has no meaning here is ignored."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls.from_dict(known | changes)

    def build(self) -> Any:
        """The ``transformers.SpeechT5HifiGan``, with random weights.

        Raises:
            UsageError: ``transformers`` is not installed.
        """
        transformers = library("transformers")
        return transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**self.to_dict())).eval()


@dataclass(frozen=True, kw_only=True)
class AudioLDM2CodecConfig:
    """Parts of :class:`AudioLDM2Codec`; the defaults are AudioLDM2's."""

    vae: AutoencoderConfig = AUDIOLDM2_VAE
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    mel: MelConfig = field(default_factory=MelConfig)

    def __post_init__(self) -> None:
        if self.vocoder.model_in_dim != self.mel.n_mels or self.mel.n_mels % self.vae.factor:
            raise ValueError(
                f"the mel has {self.mel.n_mels} bins, the vocoder takes {self.vocoder.model_in_dim}, and the VAE needs "
                f"a multiple of {self.vae.factor}"
            )
        if self.vocoder.hop != self.mel.hop_length or self.vocoder.sampling_rate != self.mel.sample_rate:
            raise ValueError(
                f"the mel has a frame per {self.mel.hop_length} samples at {self.mel.sample_rate} Hz, the vocoder one "
                f"per {self.vocoder.hop} at {self.vocoder.sampling_rate} Hz"
            )

    def to_dict(self) -> dict[str, Any]:
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AudioLDM2CodecConfig:
        values = dict(values)
        parts: tuple[tuple[str, Any], ...] = (
            ("vae", AutoencoderConfig),
            ("vocoder", VocoderConfig),
            ("mel", MelConfig),
        )
        for name, part in parts:
            if name in values:
                values[name] = config_from_dict(part, values[name])
        return config_from_dict(cls, values)

    @classmethod
    def toy(cls) -> AudioLDM2CodecConfig:
        """The same architecture, tiny; the same mel and the same latent sizes."""
        vae = AutoencoderConfig(
            in_channels=1,
            latent_channels=8,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=AUDIOLDM2_VAE.scaling_factor,
        )
        vocoder = VocoderConfig(
            upsample_initial_channel=32, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),)
        )
        return cls(vae=vae, vocoder=vocoder)


class AudioLDM2Codec(nn.Module):
    """Waveform <-> the audio latents of the official JavisDiT.

    ``vae`` is a ``diffusers.AutoencoderKL`` on log-mels [B, 1, frames, 64], ``vocoder`` a
    ``transformers.SpeechT5HifiGan``: their state dicts are what the folders ``audio_vae`` and ``vocoder`` hold.

    Raises:
        UsageError: ``diffusers`` or ``transformers`` is not installed.
    """

    def __init__(self, config: AudioLDM2CodecConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or AudioLDM2CodecConfig()
        self.vae = c.vae.build()
        self.vocoder = c.vocoder.build()

    @property
    def sample_rate(self) -> int:
        return self.config.mel.sample_rate

    def latent_sizes(self, samples: int) -> tuple[int, int]:
        """(T, M) of the latents: whole mel frames, rounded up to a multiple of 32, and 64 bins, both over 4.

        The number of frames is cut in floating point as the official code does (see ``javis.data.sizes``).

        Raises:
            ValueError: ``samples`` is not positive.
        """
        if samples < 1:
            raise ValueError(f"a waveform has at least one sample, got {samples}")
        mel, factor = self.config.mel, self.config.vae.factor
        frames = int(samples / mel.sample_rate / (mel.hop_length / mel.sample_rate))
        return math.ceil(frames / LENGTH_MULTIPLE) * LENGTH_MULTIPLE // factor, mel.n_mels // factor

    def log_mel(self, audio: Tensor) -> Tensor:
        """[B, samples] -> log-mels float32 [B, 1, frames, bins] of the length that ``latent_sizes`` stands for.

        Every waveform is normalised to a peak of 0.5. What is missing is filled with zeros in the log domain, a
        magnitude of 1 and not silence: that is what the official weights were trained on.
        """
        frames = self.latent_sizes(audio.shape[-1])[0] * self.config.vae.factor
        mel = log_mel_spectrogram(peak_normalize(audio.float()), self.config.mel)[:, :frames]
        return F.pad(mel, (0, 0, 0, frames - mel.shape[1]))[:, None]

    @torch.no_grad()
    def encode(self, audio: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """[B, samples] in -1..1 at 16 kHz -> latents [B, 8, T, 16], in the dtype of the weights.

        Args:
            audio: waveforms of more than 512 samples.
            generator: samples the posterior with it, as the official code does; None takes its mean.
        """
        return self.encode_mel(self.log_mel(audio), generator=generator)

    @torch.no_grad()
    def encode_mel(self, mel: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """What :meth:`encode` does with the log-mels [B, 1, 4 T, 64] of :meth:`log_mel`."""
        posterior = self.vae.encode(mel.to(self._dtype())).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents * self.config.vae.scaling_factor

    @torch.no_grad()
    def decode_mel(self, latents: Tensor) -> Tensor:
        """Latents [B, 8, T, 16] -> log-mels [B, 4 T, 64]: the first half of :meth:`decode`."""
        return self.vae.decode(latents.to(self._dtype()) / self.config.vae.scaling_factor).sample[:, 0]

    @torch.no_grad()
    def decode(self, latents: Tensor, samples: int, *, seeds: list[int] | None = None) -> Tensor:
        """[B, 8, T, 16] -> waveforms float32 [B, samples] in -1..1.

        The vocoder gives a little more than T * 4 frames of 160 samples. What exceeds ``samples`` is cut off; what may
        be missing, two frames at most since :meth:`latent_sizes` drops incomplete ones, is silence.

        Args:
            latents: of any length T.
            samples: length of the result.
            seeds: ignored, nothing is random here.

        Raises:
            ValueError: the latents are too short for so many samples.
        """
        available = latents.shape[2] * self.config.vae.factor * self.config.vocoder.hop
        if samples > available + 2 * self.config.vocoder.hop:
            raise ValueError(f"{latents.shape[2]} latent frames are {available} samples, {samples} were asked for")
        wave = self.vocoder(self.decode_mel(latents)).float()[:, :samples]
        return F.pad(wave, (0, samples - wave.shape[1]))

    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype
