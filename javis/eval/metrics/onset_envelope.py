"""Onsets of a sound as AV-Align takes them: the definitions and defaults of librosa's onset_strength and onset_detect.

Written here, since librosa with its compiler is 270 MB and `javis eval sync` needs these onsets without any extra;
tests hold it to recordings of librosa 0.11 and to librosa itself where that is installed. Method: Boeck and Widmer 2013
(spectral flux without their maximum filter) and Boeck, Krebs and Schedl 2012 (peak picking), with librosa's numbers.
"""

from __future__ import annotations

import numpy as np

from javis.eval.spectral import as_waveform

N_FFT, HOP, MELS = 2048, 512, 128
_FLOOR, _RANGE_DB = 1e-10, 80.0
_DELTA = 0.07
_CHUNK = 2048  # spectra made at a time


def onset_strength(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Mean rise of the mel spectrum in dB from one hop of 512 samples to the next: float64 [1 + N // 512].

    Args:
        waveform: mono [N], N >= 1.
        rate: Hz; nothing is resampled.

    Raises:
        ValueError: another shape, an empty waveform, values that are not finite, a rate that is not positive.
    """
    wave = as_waveform(waveform, rate)
    if not len(wave):
        raise ValueError("the waveform is empty, expected at least one sample")
    power = _mel_power(wave, rate)
    levels = 10.0 * np.log10(np.maximum(power, _FLOOR))
    levels = np.maximum(levels, levels.max() - _RANGE_DB)
    rise = np.maximum(levels[1:] - levels[:-1], 0.0).mean(axis=1)
    # One for the difference, two to bring the rise from the end of a transform to its centre.
    lead = 1 + N_FFT // (2 * HOP)
    return np.concatenate([np.zeros(lead), rise])[: len(levels)]


def audio_peaks(waveform: np.ndarray, rate: int, *, max_seconds: float | None = None) -> list[float]:
    """Times (s) of the onsets of a mono waveform [N]: peaks of `onset_strength` on the grid of 512 samples.

    A peak is the largest value of the 30 ms before it, and at least 0.07 above the mean of the 100 ms around it, of the
    envelope scaled to [0, 1]; the next is at least 30 ms later. A silent or constant sound has none.

    Args:
        max_seconds: leave out what comes later (before the envelope is scaled).

    Raises:
        ValueError: as `onset_strength`, or a limit that leaves no sample.
    """
    wave = np.asarray(waveform)
    if max_seconds is not None:
        wave = wave[: int(max_seconds * rate)]
    strength = onset_strength(wave, rate)
    if not strength.any():
        return []
    envelope = strength - strength.min()
    envelope = envelope / (envelope.max() + np.finfo(np.float32).tiny)
    return [frame * HOP / rate for frame in _peaks(envelope, rate)]


def _peaks(envelope: np.ndarray, rate: int) -> list[int]:
    near, around = int(0.03 * rate // HOP), int(0.10 * rate // HOP)
    found, frame = [], 0
    while frame < len(envelope):
        value = envelope[frame]
        largest = envelope[max(0, frame - near) : frame + 1].max()
        if value == largest and value >= envelope[max(0, frame - around) : frame + around + 1].mean() + _DELTA:
            found.append(frame)
            frame += near
        frame += 1
    return found


def _mel_power(wave: np.ndarray, rate: int) -> np.ndarray:
    """Power in mel bands [frames, bands], frames centred on multiples of the hop, zeros beyond the ends."""
    from javis.model.mel import MelConfig, mel_filterbank

    config = MelConfig(sample_rate=rate, n_fft=N_FFT, win_length=N_FFT, hop_length=HOP, n_mels=MELS, fmax=rate / 2)
    filters = mel_filterbank(config).numpy().astype(np.float64).T
    window = np.hanning(N_FFT + 1)[:-1]
    padded = np.pad(wave, N_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    parts = [
        np.abs(np.fft.rfft(frames[start : start + _CHUNK] * window)) ** 2 @ filters
        for start in range(0, len(frames), _CHUNK)
    ]
    return np.concatenate(parts)
