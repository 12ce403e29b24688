"""A model and batches that run in moments."""

from __future__ import annotations

from typing import Any

import torch

from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.train.recipes.batches import draw
from javis.train.recipes.config import Draws

from ...tiny import randomize

SMALL = JavisDiTConfig(
    hidden_size=24, num_heads=2, depth=2, mlp_ratio=2.0, video_channels=4, audio_channels=8, caption_channels=10,
    caption_length=6, spatial_prior_len=3, temporal_prior_len=2, prior_channels=8,
)  # fmt: skip


def small_model(seed: int = 0, config: JavisDiTConfig = SMALL) -> JavisDiT:
    """All weights random, so that every trained parameter gets a gradient."""
    model = randomize(JavisDiT(config), seed)
    assert isinstance(model, JavisDiT)
    return model


def small_clips(count: int = 3, seed: int = 0, config: JavisDiTConfig = SMALL) -> dict[str, Any]:
    """Latents and conditions of random clips of 17 frames of 32x48 pixels."""
    g = torch.Generator().manual_seed(seed)
    c = config
    return {
        "video": torch.randn(count, c.video_channels, 5, 4, 6, generator=g),
        "video_sizes": (5, 4, 6),
        "audio": torch.randn(count, c.audio_channels, 8, 4, generator=g),
        "text": torch.randn(count, c.caption_length, c.caption_channels, generator=g),
        "text_mask": torch.arange(c.caption_length).expand(count, -1) < 4,
        "spatial_prior": torch.randn(count, c.spatial_prior_len, c.prior_channels, generator=g),
        "temporal_prior": torch.randn(count, c.temporal_prior_len, c.prior_channels, generator=g),
        "fps": torch.full((count,), 24.0),
        "height": torch.full((count,), 32.0),
        "width": torch.full((count,), 48.0),
        "frames": torch.full((count,), 17.0),
    }


def small_batch(stage: str, seed: int = 0, draws: Draws | None = None, count: int = 3) -> dict[str, Any]:
    clips = small_clips(count, seed)
    if stage == "audio":
        del clips["video"]
    return draw(clips, draws or Draws(), [7, seed], with_masks=stage == "joint")
