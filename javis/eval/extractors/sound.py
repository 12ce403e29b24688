"""Waveforms as the networks want them."""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from javis.data.excerpt import resample
from javis.model.parts import library

_KALDI_FLOOR = float(torch.finfo(torch.float32).eps)


def mono_at(waveform: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Mono float32 [N] at ``to`` Hz.

    Raises:
        ValueError: not [N], empty, or not finite.
    """
    wave = np.asarray(waveform, dtype=np.float32)
    if wave.ndim != 1 or not len(wave) or not np.isfinite(wave).all():
        raise ValueError(f"the waveform is {wave.shape} or not finite, expected finite samples [N], N >= 1")
    return resample(wave, rate, to)


@lru_cache(maxsize=2)
def _kaldi(bands: int) -> tuple[np.ndarray, np.ndarray]:
    tools = library("transformers.audio_utils")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At least one mel filter")  # the lowest are narrower than a bin; Kaldi's too
        filters = tools.mel_filter_bank(
            num_frequency_bins=257,
            num_mel_filters=bands,
            min_frequency=20,
            max_frequency=8000,
            sampling_rate=16000,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return filters, tools.window_function(400, "hann", periodic=False)


def kaldi_filterbank(wave: np.ndarray, bands: int = 128) -> Tensor:
    """Kaldi's log mel filterbank of 25 ms every 10 ms at 16 kHz, after the mean is taken away: [bands, frames].

    Fewer samples than one frame are filled up with zeros.
    """
    filters, window = _kaldi(bands)
    wave = wave - wave.mean()
    levels = library("transformers.audio_utils").spectrogram(
        np.pad(wave, (0, max(0, 400 - len(wave)))),
        window,
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=_KALDI_FLOOR,
        remove_dc_offset=True,
    )
    return torch.from_numpy(np.asarray(levels, np.float32))


def to_length(values: Tensor, length: int) -> Tensor:
    """The last dimension cut, or filled up with zeros, to ``length``."""
    return torch.nn.functional.pad(values, (0, max(0, length - values.shape[-1])))[..., :length]
