"""Small models with awake weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT, Velocity

MODES = ("cross_attn", "addition", "modulate")
SIZES = ((3, 4, 6), (10, 3))  # latents: video (T, H, W), audio (Ta, M); 10 is not a multiple of the audio patch 4


def small_config(**changes: Any) -> JavisDiTConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_heads": 2, "depth": 2, "mlp_ratio": 2.0, "caption_channels": 8, "caption_length": 6,
        "spatial_prior_len": 3, "temporal_prior_len": 5, "prior_channels": 7, "input_sq_size": 32,
    }  # fmt: skip
    return JavisDiTConfig(**(sizes | changes))


def small_model(seed: int = 0, **changes: Any) -> JavisDiT:
    """A model whose parameters are all random: zero-initialised projections would hide what lies before them."""
    model = JavisDiT(small_config(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def make_inputs(
    config: JavisDiTConfig, batch: int = 2, sizes: tuple[tuple[int, ...], tuple[int, ...]] = SIZES, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(arguments of ``denoise``, arguments of ``condition``), different for every sample."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g)

    video, audio = sizes
    noisy = {
        "video": draw(config.video_channels, *video),
        "audio": draw(config.audio_channels, *audio),
        "timestep": torch.rand(batch, generator=g) * 1000,
    }
    told: dict[str, Any] = {
        "text": draw(config.caption_length, config.caption_channels),
        "text_mask": torch.arange(config.caption_length) < 1 + torch.arange(batch)[:, None] % config.caption_length,
        "fps": torch.rand(batch, generator=g) * 20 + 8,
        "height": torch.rand(batch, generator=g) * 32 + 16,
        "width": torch.rand(batch, generator=g) * 32 + 16,
        "video_sizes": video,
        "audio_sizes": audio,
    }
    if config.use_prior:
        told["spatial_prior"] = draw(config.spatial_prior_len, config.prior_channels)
        told["temporal_prior"] = draw(config.temporal_prior_len, config.prior_channels)
    return noisy, told


def pick(arguments: dict[str, Any], index: slice) -> dict[str, Any]:
    """The same arguments for some samples of the batch."""
    return {name: value[index] if isinstance(value, Tensor) else value for name, value in arguments.items()}


def run(model: JavisDiT, noisy: dict[str, Tensor], told: dict[str, Any], **masks: Tensor) -> Velocity:
    with torch.no_grad():
        return model.denoise(**noisy, condition=model.condition(**told), **masks)  # type: ignore[arg-type]


def check_equal(actual: Velocity, expected: Velocity, tolerance: float = 1e-5) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert e.abs().max() > 0.05  # the comparison is about something
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def distance(a: Velocity, b: Velocity) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def frame_masks(batch: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(9)
    (frames, _, _), (bands, _) = SIZES
    return {
        "video_mask": torch.rand(batch, frames, generator=g) < 0.5,
        "audio_mask": torch.rand(batch, bands, generator=g) < 0.5,
    }
