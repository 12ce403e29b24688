"""What the tests of this folder share: clips drawn without the world, and damage as a small model does it."""

from __future__ import annotations

import numpy as np
import torch


def disc(x: np.ndarray, y: np.ndarray, *, size: int = 64, radius: float = 0.1, colour: tuple[int, ...] = (226, 52, 46)):
    """A soft disc on dark ground at centres ``x``, ``y`` [T] (frame sides): uint8 [T, size, size, 3]."""
    pixel = (np.arange(size) + 0.5) / size
    distance = np.hypot(pixel[None, None, :] - x[:, None, None], pixel[None, :, None] - y[:, None, None])
    cover = np.clip((radius - distance) * size + 0.5, 0, 1)[..., None]
    ground = np.array([28.0, 30.0, 38.0])
    return np.round(ground + cover * (np.array(colour, float) - ground)).astype(np.uint8)


def struck(times: list[float], *, rate: int = 16000, seconds: float = 2.0, hz: float = 700.0, tau: float = 0.07):
    """Decaying sines that start at ``times``: float32 [N]."""
    wave = np.zeros(round(seconds * rate))
    for time in times:
        start = round(time * rate)
        t = np.arange(len(wave) - start) / rate
        wave[start:] += 0.4 * np.sin(2 * np.pi * hz * t) * np.exp(-t / tau)
    return wave.astype(np.float32)


def damaged_video(video: np.ndarray, seed: int = 0, *, blur: float = 0.7, noise: float = 8.0) -> np.ndarray:
    """Gaussian blur of ``blur`` pixels and noise of ``noise`` / 255."""
    taps = np.exp(-0.5 * (np.arange(-3, 4) / blur) ** 2)
    taps /= taps.sum()
    frames = np.pad(video.astype(np.float32), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    frames = sum(w * frames[:, k : k + video.shape[1]] for k, w in enumerate(taps))
    frames = sum(w * frames[:, :, k : k + video.shape[2]] for k, w in enumerate(taps))
    frames = frames + np.random.default_rng(seed).normal(0, noise, frames.shape)
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def damaged_audio(audio: np.ndarray, seed: int = 0, *, iterations: int = 32) -> np.ndarray:
    """Through a 64-band log-mel (hop 250, window 768) and back by Griffin-Lim, at 16 kHz."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.hann_window(768)
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 66)
    hz = 700 * (10 ** (mel / 2595) - 1)
    bins = np.linspace(0, 8000, 513)[None]
    left, centre, right = hz[:-2, None], hz[1:-1, None], hz[2:, None]
    bank = np.clip(np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)), 0, None)
    bank = torch.tensor(bank / bank.sum(1, keepdims=True).clip(1e-9), dtype=torch.float32)

    def stft(wave: torch.Tensor) -> torch.Tensor:
        return torch.stft(wave, 1024, 250, 768, window, center=True, return_complex=True)

    wave = torch.from_numpy(audio).float()
    log_mel = (bank @ stft(wave).abs()).clamp(min=1e-5).log()
    magnitude = (torch.linalg.pinv(bank) @ log_mel.exp()).clamp(min=0)
    estimate = torch.polar(magnitude, 2 * torch.pi * torch.rand(magnitude.shape, generator=generator))
    for _ in range(iterations):
        spectrum = stft(torch.istft(estimate, 1024, 250, 768, window, length=len(audio)))
        estimate = magnitude * spectrum / spectrum.abs().clamp(min=1e-9)
    return torch.istft(estimate, 1024, 250, 768, window, length=len(audio)).numpy()
