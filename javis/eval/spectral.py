"""Short-time spectra on a fine time grid, for the detectors and attribute readers.

Windows and hops are given in seconds, so that the same detector serves every sample rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spectra:
    """Magnitudes [frames, bins], times of the window centres [frames] (s) and frequencies [bins] (Hz)."""

    magnitude: np.ndarray
    times: np.ndarray
    frequencies: np.ndarray


def as_waveform(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Check one mono waveform and return it as float64 [N]."""
    wave = np.asarray(audio, dtype=np.float64)
    if wave.ndim != 1:
        raise ValueError(f"audio has shape {wave.shape}, expected one mono waveform [samples]")
    if sample_rate <= 0:
        raise ValueError(f"sample rate is {sample_rate}, expected Hz > 0")
    if not np.isfinite(wave).all():
        raise ValueError("audio holds NaN or infinite samples, expected finite numbers")
    return wave


def spectra(audio: np.ndarray, sample_rate: int, *, window_s: float = 0.032, hop_s: float = 0.0025) -> Spectra:
    """Hann-windowed magnitude spectra of ``audio`` [N], scaled so that a sine of amplitude a shows a peak of a.

    Frame k is centred on time ``k * hop_s``; the waveform is continued by zeros on both sides. Frames cover the
    whole clip, its end included.
    """
    wave = as_waveform(audio, sample_rate)
    length = max(2, round(window_s * sample_rate))
    window = np.hanning(length + 1)[:-1]
    size = 1 << (length - 1).bit_length()
    times = np.arange(0.0, len(wave) / sample_rate + 1e-9, hop_s)
    starts: np.ndarray = np.round(times * sample_rate).astype(int)
    padded = np.concatenate([np.zeros(length // 2), wave, np.zeros(length)])
    frames = padded[starts[:, None] + np.arange(length)] * window
    magnitude = np.abs(np.fft.rfft(frames, n=size, axis=1)) * (2.0 / window.sum())
    return Spectra(magnitude, times, np.fft.rfftfreq(size, 1.0 / sample_rate))


def band_matrix(frequencies: np.ndarray, *, low: float = 120.0, bands: int = 40) -> np.ndarray:
    """Triangular bands [bins, bands] spaced evenly on the ERB-rate scale from ``low`` Hz to the highest frequency.

    ERB-rate scale of Glasberg and Moore (1990), eq. 4. Every triangle has unit peak; bands narrower than a bin take
    the nearest bin, so none is empty.
    """
    high = float(frequencies[-1])
    if not 0 < low < high:
        raise ValueError(f"lowest band is at {low} Hz, expected between 0 and {high} Hz")
    erb = np.linspace(np.log1p(low * 0.00437), np.log1p(high * 0.00437), bands + 2)
    edges = np.expm1(erb) / 0.00437
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    f = frequencies[:, None]
    matrix = np.clip(np.minimum((f - left) / (centre - left), (right - f) / (right - centre)), 0.0, None)
    nearest = np.abs(f - centre).argmin(axis=0)
    matrix[nearest, np.arange(bands)] = np.maximum(matrix[nearest, np.arange(bands)], 0.5)
    return matrix
