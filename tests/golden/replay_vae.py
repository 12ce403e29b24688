"""Golden cases of the temporal video VAE (official VAE_Temporal and VideoAutoencoderPipeline)."""

from __future__ import annotations

import torch
from torch import Tensor

from javis.model.vae_temporal import TemporalVAE, TemporalVAEConfig, VideoVAE

from .harness import GoldenCase


def replay(case: GoldenCase) -> None:
    vae = TemporalVAE(TemporalVAEConfig.from_official(case.config))
    vae.load_state_dict(case.weights(), strict=True)
    vae.eval()
    with torch.no_grad():
        for sub in case.children("out"):
            if f"out.{sub}" in case:  # a tensor, not a group: decoding of given latents
                key = f"out.{sub}"
                case.check(key, vae.decode(case[f"in.{sub}.z"], num_frames=case[key].shape[2]))
            elif set(case.children(f"out.{sub}")) <= {"mean", "logvar", "decode"}:
                replay_direct(case, vae, sub)
            else:
                replay_pipeline(case, vae, sub)
    if "latent_size" in case.meta.get("tables", {}):
        replay_latent_sizes(case, vae)


def replay_direct(case: GoldenCase, vae: TemporalVAE, sub: str) -> None:
    x = case[f"in.{sub}.x"]
    mean, logvar = vae.encode(x)
    values = {"mean": mean, "logvar": logvar, "decode": vae.decode(mean, num_frames=x.shape[2])}
    for name in case.children(f"out.{sub}"):
        case.check(f"out.{sub}.{name}", values[name])


def pipeline(case: GoldenCase, vae: TemporalVAE, mode: str) -> VideoVAE:
    config = case.config
    chunk = {"micro": config["micro_frame_size"], "whole": None}[mode]
    return VideoVAE(vae, shift=config["shift"], scale=config["scale"], micro_frame_size=chunk)


def replay_pipeline(case: GoldenCase, vae: TemporalVAE, sub: str) -> None:
    x: Tensor = case[f"in.{sub}.x"]
    for mode in case.children(f"out.{sub}"):
        video_vae = pipeline(case, vae, mode)
        latents = video_vae.encode(x, noise=case[f"in.{sub}.{mode}.noise"])
        values = {"encode": latents, "decode": video_vae.decode(latents, num_frames=x.shape[2])}
        for name in case.children(f"out.{sub}.{mode}"):
            case.check(f"out.{sub}.{mode}.{name}", values[name])


def replay_latent_sizes(case: GoldenCase, vae: TemporalVAE) -> None:
    for row in case.table("latent_size"):
        size = tuple(row["input"])
        for mode in ("micro", "whole"):
            got = pipeline(case, vae, mode).latent_size(size, space_factor=8)
            assert got == tuple(row[mode]), (mode, size)
        assert pipeline(case, vae, "whole").latent_size(size) == tuple(row["temporal_only"]), size
