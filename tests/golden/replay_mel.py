"""Golden cases of the AudioLDM2 log-mel (official AudioLDM2MelTransform)."""

from __future__ import annotations

from typing import Any

import torch

from javis.model.mel import MelConfig, fixed_length_log_mel, mel_filterbank

from .harness import GoldenCase

MEL_ATOL = 1e-2  # golden/README.md: log domain; quiet bins are limited by rounding


def mel_config(official: dict[str, Any]) -> MelConfig:
    """Translate the official ``preprocessing`` configuration."""
    audio, stft, mel = (official["preprocessing"][name] for name in ("audio", "stft", "mel"))
    return MelConfig(
        sample_rate=audio["sampling_rate"],
        duration=audio.get("duration", MelConfig.duration),
        n_fft=stft["filter_length"],
        hop_length=stft["hop_length"],
        win_length=stft["win_length"],
        n_mels=mel["n_mel_channels"],
        fmin=mel["mel_fmin"],
        fmax=mel["mel_fmax"],
    )


def replay(case: GoldenCase) -> None:
    config = mel_config(case.config)
    for key in case.keys("out"):
        _, sub, *rest = key.split(".", 2)
        if sub == "mel_basis":
            case.check(key, mel_filterbank(config), atol=1e-6)
            continue
        duration = float(rest[0].removeprefix("dur")) if rest and rest[0].startswith("dur") else None
        case.check(key, fixed_length_log_mel(case[f"in.{sub}.wave"], duration, config), atol=MEL_ATOL)
    tables = case.meta.get("tables", {})
    second = torch.zeros(config.sample_rate)
    if "default_length" in tables:
        assert list(fixed_length_log_mel(second, None, config).shape) == case.table("default_length")
    if "rows" in tables:
        for duration, shape in case.table("rows"):
            assert list(fixed_length_log_mel(second, duration, config).shape) == shape, duration
