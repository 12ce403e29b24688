"""Log-mel front end of the built-in model and its inverse by fast Griffin-Lim (Perraudin et al., 2013)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LogMelConfig:
    """Log-mel spectrogram; frame i is centred on sample ``i * hop``."""

    sample_rate: int = 16000  # Hz
    fft: int = 1024  # points, the window is zero-padded to it
    window: int = 512  # samples of the Hann window (32 ms: short, so that onsets stay sharp)
    hop: int = 125  # samples; 8 frames per video frame at 16 frames a second
    bins: int = 64  # mel bands
    low: float = 80.0  # Hz
    high: float = 8000.0  # Hz
    floor: float = 1e-3  # magnitude below which there is silence
    iterations: int = 48  # of Griffin-Lim

    def __post_init__(self) -> None:
        if not 0 < self.hop <= self.window <= self.fft:
            raise ValueError(f"expected 0 < hop <= window <= fft, got {self.hop}, {self.window} and {self.fft}")
        if self.bins < 1 or not 0 <= self.low < self.high <= self.sample_rate / 2:
            raise ValueError(f"expected mel bands between 0 Hz and half of {self.sample_rate}, got {self}")


def mel_filters(config: LogMelConfig) -> Tensor:
    """Triangular filters with unit peak on the HTK mel scale -> [bins, fft/2+1]."""

    def mel(hz: Tensor) -> Tensor:
        return 2595.0 * torch.log10(1.0 + hz / 700.0)

    low, high = mel(torch.tensor(config.low)), mel(torch.tensor(config.high))
    edges = 700.0 * (10 ** (torch.linspace(float(low), float(high), config.bins + 2) / 2595.0) - 1.0)
    hz = torch.linspace(0, config.sample_rate / 2, config.fft // 2 + 1)[None]
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = torch.minimum((hz - left) / (centre - left), (right - hz) / (right - centre)).clamp(min=0)
    return filters / filters.sum(1, keepdim=True).clamp(min=1e-6)


class LogMel(nn.Module):
    """Normalised log-mel [B, frames, bins]: about -1 for silence, up to about 1."""

    filters: Tensor
    inverse: Tensor
    window: Tensor

    def __init__(self, config: LogMelConfig) -> None:
        super().__init__()
        self.config = config
        filters = mel_filters(config)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(filters), persistent=False)
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)
        self._range = -torch.log10(torch.tensor(config.floor)).item()  # decades between the floor and magnitude 1

    @property
    def silence(self) -> float:
        """Value of a silent bin."""
        return -1.0

    def _stft(self, audio: Tensor) -> Tensor:
        c = self.config
        spectrum = torch.stft(
            audio, c.fft, c.hop, c.window, self.window, center=True, pad_mode="constant", return_complex=True
        )
        return spectrum / (c.window / 4)  # a full-scale sine has magnitude about 1

    def _istft(self, spectrum: Tensor, samples: int) -> Tensor:
        c = self.config
        return torch.istft(spectrum * (c.window / 4), c.fft, c.hop, c.window, self.window, center=True, length=samples)

    def encode(self, audio: Tensor) -> Tensor:
        """[B, samples] -> [B, ceil(samples / hop), bins]."""
        frames = -(-audio.shape[-1] // self.config.hop)
        magnitude = self.filters @ self._stft(audio).abs()
        decades = magnitude.clamp(min=self.config.floor).log10() + self._range
        return (decades * (2 / self._range) - 1).transpose(1, 2)[:, :frames]

    def decode(self, mel: Tensor, samples: int, *, seeds: list[int] | None = None) -> Tensor:
        """[B, frames, bins] -> waveform [B, samples] in -1..1; initial phases from ``seeds`` (default 0, 1, ...)."""
        need = samples // self.config.hop + 1
        mel = mel[:, :need]
        if mel.shape[1] < need:
            mel = torch.cat((mel, mel.new_full((mel.shape[0], need - mel.shape[1], mel.shape[2]), -1.0)), dim=1)
        target = 10 ** ((mel.clamp(-1, 1.2) + 1) * (self._range / 2) - self._range)
        target = (target - self.config.floor).clamp(min=0).transpose(1, 2)
        magnitude = self._unmel(target)
        phases = []
        for i in range(len(mel)):
            generator = torch.Generator().manual_seed(seeds[i] if seeds is not None else i)
            phases.append(torch.rand(magnitude.shape[1:], generator=generator) * 2 * torch.pi)
        estimate = torch.polar(magnitude, torch.stack(phases).to(magnitude))
        previous = torch.zeros_like(estimate)
        for _ in range(self.config.iterations):
            consistent = self._stft(self._istft(estimate, samples))
            accelerated = consistent + 0.99 * (consistent - previous)
            previous = consistent
            estimate = magnitude * accelerated / accelerated.abs().clamp(min=1e-9)
        return self._istft(estimate, samples).clamp(-1, 1)

    def _unmel(self, target: Tensor) -> Tensor:
        """Non-negative magnitudes whose mel bands are ``target``: multiplicative updates from the pseudo-inverse."""
        magnitude = (self.inverse @ target).clamp(min=1e-6)
        for _ in range(8):
            magnitude = magnitude * (self.filters.T @ target) / (self.filters.T @ (self.filters @ magnitude) + 1e-8)
        return magnitude
