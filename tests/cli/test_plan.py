"""``javis plan`` against PyTorch's own FLOP counter, and against the figures of the design."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from javis.cli import main
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.plan import Grid, PlanArgs, condition_flops, count_parameters, counts, official_grid, step_flops, token_grid

SMALL = {
    "hidden_size": 48,
    "num_heads": 4,
    "depth": 2,
    "caption_channels": 20,
    "caption_length": 7,
    "spatial_prior_len": 3,
    "temporal_prior_len": 5,
    "prior_channels": 12,
}


CHANGES: list[dict[str, object]] = [
    {},
    {"pred_sigma": False, "mlp_ratio": 3.0, "video_patch": (1, 1, 2), "audio_patch": (2, 2), "qk_norm": False},
    {"prior_mode": "addition"},
    {"prior_mode": "modulate"},
    {"use_prior": False},
    {"use_bidirectional": False},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_flops_are_those_that_pytorch_counts(change: dict[str, object]) -> None:
    config = JavisDiTConfig(**{**SMALL, **change})  # type: ignore[arg-type]
    model, batch, text = JavisDiT(config), 2, 6
    video, audio = (3, 5, 8), (9, 6)
    told = {
        "fps": torch.full((batch,), 16.0),
        "height": torch.full((batch,), 64.0),
        "width": torch.full((batch,), 64.0),
        "video_sizes": video,
        "audio_sizes": audio,
        "spatial_prior": torch.randn(batch, 3, 12),
        "temporal_prior": torch.randn(batch, 5, 12),
        "with_prior": config.use_prior,
    }
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        condition = model.condition(torch.randn(batch, text, 20), **told)  # type: ignore[arg-type]
    assert (
        condition_flops(config, token_grid(config, video, audio), batch=batch, text=text) == counter.get_total_flops()
    )
    # The counter does not know the fused attention of CPUs; the plain one is two products that it does know.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.denoise(
            torch.randn(batch, config.video_channels, *video),
            torch.randn(batch, config.audio_channels, *audio),
            torch.full((batch,), 500.0),
            condition,
        )
    grid = token_grid(config, video, audio)
    planned = sum(step_flops(config, grid, batch=batch, text=text).values())
    assert counter.get_total_flops() == planned


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_parameters_are_those_of_the_model(change: dict[str, object]) -> None:
    config = JavisDiTConfig(**{**SMALL, **change})  # type: ignore[arg-type]
    tied = config.caption_length * config.caption_channels
    assert count_parameters(config) == sum(p.numel() for p in JavisDiT(config).parameters()) - tied


@pytest.mark.parametrize(
    ("resolution", "places", "tflop", "tolerance"),
    [("240p", 405, 41, 0.01), ("512x512", 1024, 104, 0.01), ("720p", 3600, 400, 0.02)],
)
def test_official_size_as_in_the_design(resolution: str, places: int, tflop: float, tolerance: float) -> None:
    facts = counts(PlanArgs(resolution=resolution, seconds=2))
    tokens = facts["tokens"]
    assert (tokens["video_frames"], tokens["video_places"], tokens["audio"]) == (15, places, 224)
    assert facts["clip"]["frames"] == 51
    grid = Grid(15, places, 14, 16)
    unfolded = sum(step_flops(JavisDiTConfig(), grid, batch=2, folded=False).values()) / 1e12
    assert unfolded == pytest.approx(tflop, rel=tolerance)
    # Folding 32 tokens of 16 heads saves 2 C (2 C) - 2 C (15 x 32) multiply-adds per token, axis and layer.
    saved = 2 * 2 * 28 * 2 * (15 * places + 224) * (2 * 1152 * 1152 - 2 * 1152 * 15 * 32) / 1e12
    assert facts["tflop_per_step"]["total"] == pytest.approx(unfolded - saved, rel=1e-6)
    if resolution == "720p":  # 3,641 TFLOP counted on the official code
        assert facts["official_tflop_per_step"] == pytest.approx(3641, rel=0.005)


def test_guidance_doubles_and_steps_multiply() -> None:
    one, two = counts(PlanArgs(guidance=False, steps=1)), counts(PlanArgs(steps=1))
    assert two["tflop_per_step"]["total"] == pytest.approx(2 * one["tflop_per_step"]["total"])
    many = counts(PlanArgs(steps=30))
    assert many["clip_tflop"] - two["clip_tflop"] == pytest.approx(29 * two["tflop_per_step"]["total"])
    assert many["denoise_seconds"] == pytest.approx(many["clip_tflop"] / 500)


def test_sizes_that_are_not_whole_patches_are_rounded_up() -> None:
    grid = official_grid(JavisDiTConfig(), frames=20, height=248, width=136, fps=24)
    assert (grid.video_frames, grid.video_places) == (5 + 1, 16 * 9)


def test_printed_and_json_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "demo", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["plan", "--model", "demo"]) == 0
    assert f"{facts['tflop_per_step']['total']:.4g} TFLOP" in capsys.readouterr().out
