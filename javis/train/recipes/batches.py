"""Batches of the flow stages: what is drawn in every step, on top of a clip's latents and conditions.

Everything drawn is a pure function of a seed, so a resumed run draws the same. A batch is a dict:

- ``video`` [B, Cv, T, H, W], ``audio`` [B, Ca, Ta, M]: clean latents, float32; the audio stage needs no ``video``, but
  ``video_sizes``, (T, H, W) of its latents;
- ``text`` [B, L, Cc], ``text_mask`` bool [B, L]; ``spatial_prior``, ``temporal_prior`` [B, N, Cp] (joint stage);
- ``fps``, ``height``, ``width`` [B]: frames per second and pixels; ``frames`` [B]: frames of the clip;
- drawn here: ``t`` [B] in 0..1000, ``video_noise``, ``audio_noise``, ``drop_text``, ``drop_audio_text``, ``drop_prior``
  bool [B], and, with condition masks, ``video_mask`` bool [B, T], ``audio_mask`` bool [B, Ta], ``mask_kinds``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from javis.flow import sample_timesteps, timestep_ratio
from javis.train.recipes.config import Draws
from javis.train.recipes.masks import draw_masks


def draw(clips: dict[str, Any], draws: Draws, seed: list[int], *, with_masks: bool) -> dict[str, Any]:
    """Complete a batch of clean latents and conditions with what is drawn for them.

    Args:
        clips: the first three lines of this file's list.
        seed: of the step and the process; the same seed draws the same.
        with_masks: draw condition masks, too.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    audio = clips["audio"]
    count, device = len(audio), audio.device
    ratio: Any = draws.shift
    if ratio is None:
        ratio = timestep_ratio(*(clips[name].float().cpu() for name in ("height", "width", "frames")))
    drawn: dict[str, Any] = {
        "t": sample_timesteps(count, generator=generator, ratio=ratio, logit_std=draws.logit_std),
        "audio_noise": torch.randn(audio.shape, generator=generator),
    }
    if "video" in clips:
        drawn["video_noise"] = torch.randn(clips["video"].shape, generator=generator)
    chances = np.repeat(rng.random((1, count)), 3, axis=0) if draws.drop == "together" else rng.random((3, count))
    for name, chance, share in zip(
        ("drop_text", "drop_audio_text", "drop_prior"),
        chances,
        (draws.drop_text, draws.drop_text, draws.drop_prior),
        strict=True,
    ):
        drawn[name] = torch.from_numpy(chance < share)
    kinds: tuple[str, ...] = ()
    if with_masks and draws.masks:
        masks = draw_masks(rng, count, clips["video"].shape[2], audio.shape[2], draws.masks)
        drawn |= {"video_mask": masks.video, "audio_mask": masks.audio}
        kinds = masks.kinds
    return clips | {name: value.to(device, non_blocking=True) for name, value in drawn.items()} | {"mask_kinds": kinds}
