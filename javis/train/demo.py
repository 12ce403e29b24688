"""``javis train demo``: the built-in model from nothing to packaged weights, in the paper's three stages.

1. branches: video and audio branch each on their own (no priors, no bidirectional attention). The paper trains only the
   audio branch here, as its video branch comes from Open-Sora; ours has no such ancestor.
2. prior: the HiST-Sypo estimator, contrastively.
3. joint: everything together with the frozen estimator.

Every stage resumes where it was killed; a finished stage is not repeated.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from javis.bench_environment import environment
from javis.model.codecs import PatchAudioCodec, PatchVideoCodec, codec_config
from javis.train.checkpoint import load_state
from javis.train.config import DemoTrainConfig
from javis.train.latents import build_latents, fit_codecs, load_codecs, save_codecs
from javis.train.prior_stage import run_prior_stage
from javis.train.refinement import refined
from javis.train.stages import launch_flow_stage

log = logging.getLogger("javis.train")

VALIDATION_SEED = 1_000_000_000  # world seeds of validation clips; training uses 0..clips
CODEC_SEED = 900_000_000


def prepare(config: DemoTrainConfig) -> tuple[PatchVideoCodec, PatchAudioCodec]:
    """Fit the codecs and precompute the latents; does nothing that is already there."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "codecs.safetensors"
    if not path.exists():
        video, audio = PatchVideoCodec(config.video_codec), PatchAudioCodec(config.audio_codec, config.mel)
        fit_codecs(video, audio, config.world, config.codec_clips, CODEC_SEED)
        if config.refinement.steps:
            video = refined(video, config.world, config.refinement, seed=config.seed)
        save_codecs(path, video, audio)
    video, audio = load_codecs(path)
    for name, clips, seed, split in (
        ("train", config.clips, 0, "train"),
        ("validation", config.validation_clips, VALIDATION_SEED, "any"),
    ):
        build_latents(
            out / name,
            video,
            audio,
            config.world,
            clips=clips,
            seed=seed + config.seed * 100_000_000,
            processes=config.processes,
            split=split,
        )
        log.info("latents of %s: %d clips", name, clips)
    return video, audio


def run(config: DemoTrainConfig) -> Path:
    """All stages; returns the folder of the exported checkpoint."""
    out = Path(config.out)
    prepare(config)
    told = asdict(config) | {"environment": environment(config.device)}
    (out / "config.json").write_text(json.dumps(told, indent=1, default=str))
    launch_flow_stage("branches", config, None, None)
    prior = run_prior_stage(config)
    launch_flow_stage("joint", config, prior, out / "branches")
    return export(config, out / "checkpoint")


def export(config: DemoTrainConfig, folder: Path) -> Path:
    """Write the averaged weights in float16 as a checkpoint folder (``model.safetensors``, ``config.json``)."""
    out = Path(config.out)
    video, audio = load_codecs(out / "codecs.safetensors")
    joint, prior = load_state(out / "joint"), load_state(out / "prior")
    if joint is None or prior is None:
        raise FileNotFoundError(f"nothing to export: {out} holds no finished joint and prior stage")
    state: dict[str, Tensor] = {}
    weights = dict(joint[1]["ema"])
    weights["embed.audio_text.null"] = weights["embed.video_text.null"]  # tied, as in the official code
    state |= {f"model.{name}": value for name, value in weights.items()}
    training_only = ("video_embedder", "audio_embedder", "va_spatial", "va_temporal", "discriminator")
    state |= {f"prior.{n}": v for n, v in prior[1]["model"].items() if not n.startswith(training_only)}
    state = {name: value.to(torch.float16).contiguous() for name, value in state.items()}
    state |= {f"video_codec.{n}": v.float().contiguous() for n, v in video.state_dict().items()}
    state |= {f"audio_codec.{n}": v.float().contiguous() for n, v in audio.state_dict().items()}
    prior_config = config.prior_model().to_dict() | {"encode_va": False}
    description: dict[str, Any] = {
        "format": "javis",
        "version": 1,
        "world": "javis",
        "model": config.model().to_dict(),
        "prior": prior_config,
        "codecs": codec_config(video, audio),
        "text": asdict(config.text),
        "clip": {
            "size": config.world.size,
            "fps": config.world.fps,
            "seconds": config.world.seconds,
            "sample_rate": config.world.sample_rate,
        },
        "sampling": {
            "steps": 16,
            "guidance": 2.5,
            "audio_guidance": 4.0,  # with two sources the quieter one goes missing at less
            "order": "sound_first",
            "timestep_ratio": config.sampling_ratio,
        },
        "training": {"steps": joint[0]["step"], "seconds": round(joint[0]["seconds"])},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    (folder / "config.json.tmp").write_text(json.dumps(description, indent=1, default=list))
    os.replace(folder / "config.json.tmp", folder / "config.json")
    return folder


def main(config: DemoTrainConfig) -> int:
    """Command-line entry: train, then say where the checkpoint is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("checkpoint: %s", run(config))
    return 0
