"""The log-mel of a batch of waveforms, as `javis.model.mel` has it for one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from javis.model.mel import MelConfig, log_mel_spectrogram, peak_normalize


def mel_config(sample_rate: int) -> MelConfig:
    """AudioLDM2's geometry; the official weights take 16,000 Hz."""
    return MelConfig(sample_rate=sample_rate, fmax=min(MelConfig.fmax, sample_rate / 2))


def batch_log_mel(waveform: Tensor, seconds: float, sample_rate: int = 16000) -> Tensor:
    """Log-mel of AudioLDM2 of audio [B, samples] -> [B, 1, frames, 64]; row by row `fixed_length_log_mel`.

    ``seconds`` is the length of the clips; the number of frames follows from it (`MelConfig.target_length`).
    """
    config = mel_config(sample_rate)
    return fit_frames(log_mel_spectrogram(peak_normalize(waveform), config), config.target_length(seconds))


def fit_frames(mel: Tensor, frames: int) -> Tensor:
    """Log-mel [B, T, 64] -> [B, 1, frames, 64]: cut, or padded with zeros in the log domain (as officially)."""
    return F.pad(mel[:, :frames], (0, 0, 0, max(0, frames - mel.shape[1])))[:, None]
