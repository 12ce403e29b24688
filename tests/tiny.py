"""A tiny checkpoint with random weights, written by the export of the training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from javis.model.codecs import PatchAudioCodec, PatchTransformConfig, PatchVideoCodec
from javis.model.dit import JavisDiT
from javis.model.prior import PriorEstimator
from javis.model.vocoder import LogMelConfig
from javis.train.checkpoint import save_state
from javis.train.config import DemoTrainConfig, StageConfig
from javis.train.demo import export
from javis.train.latents import save_codecs
from javis.train.refinement import RefinementTraining
from javis.world import WorldConfig


def tiny_config(out: Path, **changes: object) -> DemoTrainConfig:
    """The built-in model's training at a size that runs in moments; the vocabulary is the real one."""
    sizes: dict[str, object] = {
        "out": out,
        "clips": 6,
        "validation_clips": 2,
        "codec_clips": 2,
        "batch": 3,
        "processes": 1,
        "precision": "fp32",
        "branches": StageConfig(steps=2, warmup=1, decay=0.0),
        "prior": StageConfig(steps=2, warmup=1),
        "joint": StageConfig(steps=2, warmup=1),
        "world": WorldConfig(size=32),
        "video_codec": PatchTransformConfig(channels=3, patch=(2, 8, 8), coefficients=6),
        "refinement": RefinementTraining(channels=4, clips=3, steps=2, batch=2, latents=3),
        "audio_codec": PatchTransformConfig(channels=1, patch=(8, 16), coefficients=5),
        "mel": LogMelConfig(iterations=4),
        "width": 24,
        "heads": 2,
        "depth": 1,
        "mlp_ratio": 2.0,
        "prior_tokens": 2,
        "prior_channels": 8,
    }
    return DemoTrainConfig(**(sizes | changes))  # type: ignore[arg-type]


def randomize(module: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """All parameters random, so that nothing is hidden behind a projection that starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def write_stages(config: DemoTrainConfig) -> None:
    """What the export reads: codecs and the states of the finished stages, with random weights."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    video, audio = PatchVideoCodec(config.video_codec), PatchAudioCodec(config.audio_codec, config.mel)
    for codec, seed in ((video, 1), (audio, 2)):
        values = torch.randn(codec.config.values, codec.config.values, generator=torch.Generator().manual_seed(seed))
        codec.transform.basis.copy_(torch.linalg.qr(values).Q[: codec.config.coefficients])
    save_codecs(out / "codecs.safetensors", video, audio)
    model = randomize(JavisDiT(config.model()), 0)
    prior = randomize(PriorEstimator(config.prior_model()), 1)
    save_state(out / "joint", 1, {"ema": model.state_dict()}, {"seconds": 0.0})
    save_state(out / "prior", 1, {"model": prior.state_dict()}, {"seconds": 0.0})


def write_tiny_checkpoint(folder: Path) -> Path:
    """Write ``folder/checkpoint`` and return it."""
    config = tiny_config(folder)
    write_stages(config)
    return export(config, folder / "checkpoint")
