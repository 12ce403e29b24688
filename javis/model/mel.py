"""Log-mel spectrograms as AudioLDM2 computes them, in torch alone.

The audio latents of JavisDiT are those of the AudioLDM2 VAE, whose input this is: peak-normalised mono audio, magnitude
STFT, Slaney mel filters, natural logarithm with a floor. Every size comes from :class:`MelConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH_MULTIPLE = 32  # frames are a multiple of what the audio VAE (4x) and the model's patches need


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    """Geometry of the spectrogram; the defaults are AudioLDM2's."""

    sample_rate: int = 16000  # Hz
    n_fft: int = 1024  # samples of one transform
    win_length: int = 1024  # samples of the Hann window, centred in n_fft
    hop_length: int = 160  # samples between frames (10 ms)
    n_mels: int = 64
    fmin: float = 0.0  # Hz
    fmax: float = 8000.0  # Hz
    floor: float = 1e-5  # smallest mel magnitude before the logarithm
    duration: float = 10.24  # seconds that fixed_length_log_mel makes by default

    def __post_init__(self) -> None:
        if not 0 < self.win_length <= self.n_fft:
            raise ValueError(f"win_length {self.win_length} must be within 1..n_fft {self.n_fft}")
        if self.hop_length <= 0 or self.n_mels <= 0 or self.sample_rate <= 0:
            raise ValueError("hop_length, n_mels and sample_rate must be positive")
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(
                f"mel range {self.fmin}..{self.fmax} Hz must be increasing and within 0..{self.sample_rate / 2} Hz"
            )

    def target_length(self, duration: float | None = None) -> int:
        """Frames for ``duration`` seconds, rounded up to a multiple of 32: 1024 for the default 10.24 s."""
        seconds = self.duration if duration is None else duration
        if seconds < 0:
            raise ValueError(f"duration must not be negative, got {seconds} s")
        frames = int(seconds * self.sample_rate / self.hop_length)
        return math.ceil(frames / LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's mel scale: linear (200/3 Hz per mel) below 1 kHz, logarithmic (27 mels per factor 6.4) above."""
    linear = hz / (200.0 / 3)
    return torch.where(hz < 1000.0, linear, 15.0 + torch.log(hz.clamp_min(1e-9) / 1000.0) * (27.0 / math.log(6.4)))


def mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of :func:`hz_to_mel`."""
    return torch.where(mel < 15.0, mel * (200.0 / 3), 1000.0 * torch.exp((mel - 15.0) * (math.log(6.4) / 27.0)))


@lru_cache(maxsize=16)
def mel_filterbank(config: MelConfig) -> Tensor:
    """Triangular filters of unit area per Hz (Slaney norm), float32 [n_mels, n_fft // 2 + 1], computed in float64."""
    bins = torch.linspace(0, config.sample_rate / 2, config.n_fft // 2 + 1, dtype=torch.float64)
    limits = hz_to_mel(torch.tensor([config.fmin, config.fmax], dtype=torch.float64))
    edges = mel_to_hz(torch.linspace(limits[0].item(), limits[1].item(), config.n_mels + 2, dtype=torch.float64))
    low, centre, high = (edges[i : i + config.n_mels, None] for i in range(3))
    triangles = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp_min(0)
    return (triangles * (2.0 / (high - low))).float()


def mel_spectrogram(wave: Tensor, config: MelConfig | None = None) -> Tensor:
    """Mel magnitudes of audio [..., N] -> [..., 1 + N // hop_length, n_mels]; differentiable, not normalised, no log.

    Frames are centred on multiples of the hop, with reflection at the ends, which needs N > n_fft // 2 samples.
    """
    c = config or MelConfig()
    if wave.shape[-1] <= c.n_fft // 2:
        raise ValueError(f"the audio has {wave.shape[-1]} samples; a spectrogram needs more than {c.n_fft // 2}")
    window = torch.hann_window(c.win_length, periodic=True, dtype=wave.dtype, device=wave.device)
    rows = wave.reshape(-1, wave.shape[-1])
    spectrum = torch.stft(
        rows, c.n_fft, c.hop_length, c.win_length, window, center=True, pad_mode="reflect", return_complex=True
    )
    mel = mel_filterbank(c).to(wave) @ spectrum.abs()  # [rows, n_mels, T]
    return mel.transpose(1, 2).reshape(*wave.shape[:-1], -1, c.n_mels)


def log_mel_spectrogram(wave: Tensor, config: MelConfig | None = None) -> Tensor:
    """``log(max(mel, floor))`` of audio [..., N] -> [..., T, n_mels]."""
    c = config or MelConfig()
    return mel_spectrogram(wave, c).clamp_min(c.floor).log()


def peak_normalize(wave: Tensor) -> Tensor:
    """Remove the mean and scale the peak to 0.5; audio [..., N] in -1..1. Silence stays silence."""
    wave = wave - wave.mean(dim=-1, keepdim=True)
    return (wave / (wave.abs().amax(dim=-1, keepdim=True) + 1e-8) * 0.5).clamp(-1.0, 1.0)


def fixed_length_log_mel(wave: Tensor, duration: float | None = None, config: MelConfig | None = None) -> Tensor:
    """Input of the AudioLDM2 VAE: normalised log-mel of exactly ``config.target_length(duration)`` frames.

    Args:
        wave: mono audio [N], or [channels, N] of which the first channel is used; float32 at ``config.sample_rate``.
        duration: seconds; None for the configured one.

    Returns:
        [1, T, n_mels]. Longer audio is cut. Shorter audio is padded with zeros in the log domain (a magnitude of 1, not
        silence): that is what the official weights were trained on.
    """
    c = config or MelConfig()
    if wave.ndim not in (1, 2):
        raise ValueError(f"audio must be [N] or [channels, N], got {tuple(wave.shape)}")
    mono = wave if wave.ndim == 1 else wave[0]
    mel = log_mel_spectrogram(peak_normalize(mono), c)
    length = c.target_length(duration)
    return F.pad(mel[:length], (0, 0, 0, max(0, length - len(mel))))[None]
