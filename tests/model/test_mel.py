"""The AudioLDM2 log-mel against a computation in numpy, and its contract of lengths and levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from javis.model.mel import (
    MelConfig,
    fixed_length_log_mel,
    hz_to_mel,
    log_mel_spectrogram,
    mel_filterbank,
    mel_spectrogram,
    mel_to_hz,
    peak_normalize,
)

CONFIGS = {
    "audioldm2": MelConfig(),
    "other": MelConfig(sample_rate=8000, n_fft=256, win_length=200, hop_length=50, n_mels=20, fmin=60, fmax=3500),
}


def numpy_filterbank(c: MelConfig) -> np.ndarray:
    """Slaney filters, one by one, with the piecewise scale written out."""

    def to_hz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)

    points = np.linspace(to_mel(c.fmin), to_mel(c.fmax), c.n_mels + 2)
    edges = [to_hz(point) for point in points]
    bins = np.arange(c.n_fft // 2 + 1) * c.sample_rate / c.n_fft
    filters = [
        np.interp(bins, edges[i : i + 3], [0, 2 / (edges[i + 2] - edges[i]), 0], left=0, right=0)
        for i in range(c.n_mels)
    ]
    return np.array(filters)


def numpy_mel(wave: np.ndarray, c: MelConfig) -> np.ndarray:
    """Magnitudes of explicitly windowed frames."""
    padded = np.pad(wave, c.n_fft // 2, mode="reflect")
    window = np.zeros(c.n_fft)
    start = (c.n_fft - c.win_length) // 2
    window[start : start + c.win_length] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(c.win_length) / c.win_length)
    count = 1 + len(wave) // c.hop_length
    frames = np.stack([padded[i * c.hop_length : i * c.hop_length + c.n_fft] for i in range(count)])
    return np.abs(np.fft.rfft(frames * window)) @ numpy_filterbank(c).T


@pytest.mark.parametrize("name", CONFIGS)
def test_spectrogram_and_filters_against_numpy(name: str) -> None:
    c = CONFIGS[name]
    np.testing.assert_allclose(mel_filterbank(c).numpy(), numpy_filterbank(c), atol=1e-7)
    wave = np.random.default_rng(0).standard_normal(3007)
    expected = numpy_mel(wave, c)
    got = mel_spectrogram(torch.from_numpy(wave), c).numpy()
    assert got.shape == (1 + 3007 // c.hop_length, c.n_mels)
    np.testing.assert_allclose(got, expected, atol=1e-6)  # the filters are float32
    log_mel = log_mel_spectrogram(torch.from_numpy(wave * 1e-6), c).numpy()
    np.testing.assert_allclose(log_mel, np.log(np.maximum(expected * 1e-6, 1e-5)), atol=1e-4)
    assert (log_mel == np.float64(np.log(1e-5))).any()


def test_batches_equal_single_waves_and_gradients_flow() -> None:
    waves = torch.randn(2, 3, 4000, requires_grad=True)
    together = log_mel_spectrogram(waves)
    assert together.shape == (2, 3, 26, 64)
    torch.testing.assert_close(together[1, 2], log_mel_spectrogram(waves[1, 2]))
    together.sum().backward()
    assert waves.grad is not None
    assert torch.isfinite(waves.grad).all()
    assert waves.grad.abs().max() > 0


@given(hz=st.floats(1.0, 20000.0))
def test_mel_scale_inverts(hz: float) -> None:
    value = torch.tensor(hz, dtype=torch.float64)
    assert mel_to_hz(hz_to_mel(value)).item() == pytest.approx(hz, rel=1e-12)


@pytest.mark.parametrize("hz", [220.0, 1000.0, 5000.0])
def test_a_tone_is_loudest_in_its_own_band(hz: float) -> None:
    wave = torch.sin(2 * torch.pi * hz * torch.arange(16000) / 16000)
    band = mel_spectrogram(wave)[50].argmax().item()
    edges = mel_to_hz(torch.linspace(0, hz_to_mel(torch.tensor(8000.0)).item(), 66))
    assert edges[band] <= hz <= edges[band + 2]


@given(seconds=st.floats(0.01, 12.0))
def test_length_is_the_next_multiple_of_32(seconds: float) -> None:
    frames = int(seconds * 100)
    length = MelConfig().target_length(seconds)
    assert length % 32 == 0
    assert 0 <= length - frames < 32


def test_fixed_length_pads_with_zeros_cuts_and_uses_the_first_channel() -> None:
    wave = torch.randn(2, 8000)
    mel = fixed_length_log_mel(wave, duration=1.0)
    assert mel.shape == (1, 128, 64)
    assert torch.equal(mel[0, 51:], torch.zeros(77, 64))
    assert torch.equal(mel[0, :51], log_mel_spectrogram(peak_normalize(wave[0])))
    assert torch.equal(fixed_length_log_mel(wave, duration=0.3)[0], mel[0, :32])
    assert torch.equal(fixed_length_log_mel(wave[0], duration=1.0), mel)


def test_level_and_offset_of_the_recording_do_not_matter() -> None:
    wave = torch.randn(5000)
    normal = peak_normalize(wave)
    assert normal.abs().max().item() == pytest.approx(0.5, rel=1e-6)
    torch.testing.assert_close(peak_normalize(wave * 0.01 + 0.3), normal, atol=1e-5, rtol=0)
    assert torch.equal(peak_normalize(torch.zeros(100)), torch.zeros(100))
    silence = fixed_length_log_mel(torch.zeros(5000), duration=0.32)
    torch.testing.assert_close(silence, torch.full((1, 32, 64), float(np.log(1e-5))))


def test_unusable_input_is_named() -> None:
    with pytest.raises(ValueError, match="512 samples; a spectrogram needs more than 512"):
        mel_spectrogram(torch.zeros(512))
    with pytest.raises(ValueError, match=r"\[N\] or \[channels, N\]"):
        fixed_length_log_mel(torch.zeros(1, 1, 8000))
    with pytest.raises(ValueError, match="must not be negative"):
        MelConfig().target_length(-1)
    with pytest.raises(ValueError, match="mel range"):
        MelConfig(fmax=9000)
