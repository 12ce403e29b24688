"""Names of the official parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from javis.model.checkpoint import from_official, to_official

from .small import MODES, small_model

VARIANTS: list[dict[str, Any]] = [
    *({"prior_mode": mode} for mode in MODES),
    {"qk_norm": False},
    {"use_prior": False},
    {"use_bidirectional": False},
    {"clock": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_names_survive_the_way_to_official_and_back(changes: dict[str, Any]) -> None:
    state = small_model(**changes).state_dict()
    official = to_official(state)
    assert len(official) == len(state)
    ours = ("embed.", "layers.", "video_spatial", "modulation", "time_block.", "video_final", "_prior.")
    assert not [name for name in official if name.startswith(ours)]
    back = from_official(official)
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)  # each value under its own name


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("x_embedder.proj.weight", "embed.video.proj.weight"),
        ("ax_embedder.proj.bias", "embed.audio.proj.bias"),
        ("t_embedder.mlp.2.weight", "embed.time.fc2.weight"),
        ("t_block.1.bias", "time_block.bias"),
        ("st_t_block.1.weight", "prior_time_block.weight"),
        ("y_embedder.y_proj.fc1.weight", "embed.video_text.proj.fc1.weight"),
        ("audio_final_layer.scale_shift_table", "audio_final.modulation"),
        ("audio_temporal_blocks.1.cross_attn.kv_linear.bias", "layers.1.audio_temporal.text.kv.bias"),
        ("spatial_blocks.0.scale_shift_table", "layers.0.video_spatial.modulation"),
        ("va_cross_blocks.1.gamma_m2", "layers.1.bidirectional.audio_scale"),
        ("va_cross_blocks.0.cross_attn.values_m1_proj.weight", "layers.0.bidirectional.video_v.weight"),
        ("video_st_prior_blocks.0.temporal_cross_attn.q_linear.weight", "layers.0.video_prior.temporal.attn.q.weight"),
    ],
)
def test_some_names(official: str, ours: str) -> None:
    assert ours in small_model().state_dict()
    value = torch.zeros(1)
    assert list(from_official({official: value})) == [ours]
    assert list(to_official({ours: value})) == [official]


def test_projection_of_a_prior_step_depends_on_the_form() -> None:
    value = torch.zeros(1)
    name = "audio_st_prior_blocks.0.spatial_cross_attn.proj.weight"
    assert list(from_official({name: value})) == ["layers.0.audio_prior.spatial.proj.weight"]
    query = "video_st_prior_blocks.0.spatial_cross_attn.q_linear.weight"
    assert "layers.0.audio_prior.spatial.attn.proj.weight" in from_official({name: value, query: value})


def test_tables_that_can_be_computed_are_dropped() -> None:
    value = torch.zeros(1)
    assert from_official({"rope.freqs": value, "temporal_blocks.0.attn.rotary_emb.inv_freq": value}) == {}


@pytest.mark.parametrize("name", ["colour.weight", "blocks.0.attn.qkv.weight", "x_embedders.weight", ""])
def test_unknown_names_are_errors(name: str) -> None:
    with pytest.raises(KeyError, match="official JavisDiT model"):
        from_official({name: torch.zeros(1)})
    with pytest.raises(KeyError, match="javis model"):
        to_official({name: torch.zeros(1)})
