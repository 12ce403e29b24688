"""Prior checkpoints: official names, with and without the text tower that the official file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from javis.convert import convert
from javis.errors import FailedError
from javis.model.prior import PriorConfig, PriorEstimator

from .official import imagebind_state, prior_state, write_folder

SIZES = {"text_emb_dim": 16, "spatial_token_num": 3, "temporal_token_num": 2, "out_dim": 8, "nhead": 2}


def read(folder: Path) -> tuple[PriorConfig, dict[str, torch.Tensor]]:
    config = PriorConfig.from_dict(json.loads((folder / "config.json").read_text()))
    return config, load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("trained", [True, False], ids=["with the embedder of training", "inference only"])
def test_round_trip(tmp_path: Path, layers: int, trained: bool) -> None:
    state = prior_state(layers=layers, trained=trained)
    official = SIZES | {"model_type": "STPriorExtractor", "encode_va": trained, "apply_sampling": True, "qk_norm": True}
    report = convert(write_folder(tmp_path / "prior", state, official), tmp_path / "out")
    config, ours = read(tmp_path / "out" / "prior")
    assert (config.num_encoder_layers, config.num_decoder_layers, config.num_heads) == (layers, layers, 2)
    assert (config.text_channels, config.out_dim, config.ffn_size, config.encode_va) == (16, 8, 64, trained)
    PriorEstimator(config).load_state_dict(ours, strict=True)
    assert set(ours) == set(state) and all(torch.equal(ours[name], state[name]) for name in state)
    assert not report.renamed and not report.problems() and not report.components["prior"]["assumed"]


def test_without_a_config_the_official_heads_are_assumed_and_said(tmp_path: Path) -> None:
    report = convert(write_folder(tmp_path / "prior", prior_state(trained=False)), tmp_path / "out")
    assert report.components["prior"]["assumed"] == {"num_heads": 4, "apply_sampling": True}
    assert read(tmp_path / "out" / "prior")[0].out_dim == 8


def test_deterministic_priors_and_onsets(tmp_path: Path) -> None:
    state = prior_state(trained=False)
    state |= {"out_proj.weight": torch.zeros(8, 16), "out_proj.bias": torch.zeros(8)}
    state |= {"onset_predictor.weight": torch.zeros(1, 8), "onset_predictor.bias": torch.zeros(1)}
    convert(write_folder(tmp_path / "prior", state, SIZES), tmp_path / "out")
    config, _ = read(tmp_path / "out" / "prior")
    assert config.pred_onset and not config.apply_sampling and config.out_dim == 8


def test_the_text_tower_of_the_official_file_becomes_its_own_component(tmp_path: Path) -> None:
    tower = imagebind_state(width=16, layers=2, text_only=True)
    state = prior_state(trained=False) | {f"text_encoder.{name}": value for name, value in tower.items()}
    state["st_prior_embedder.y_embedding"] = torch.zeros(5, 8)
    report = convert(write_folder(tmp_path / "prior", state, SIZES), tmp_path / "out")
    assert sorted(report.components) == ["prior", "prior_text_encoder"] and not report.problems()
    text = load_file(tmp_path / "out" / "prior_text_encoder" / "model.safetensors")
    assert torch.equal(text["token_embedding.weight"], tower["modality_preprocessors.text.token_embedding.weight"])
    assert torch.equal(text["position_embedding"], tower["modality_preprocessors.text.pos_embed"][0])
    assert {row["source"] for row in report.ignored} >= {"st_prior_embedder.y_embedding"}
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["components"] == {"prior": "PriorEstimator", "prior_text_encoder": "ImageBindTextEncoder"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("prior_extractor.encoder.norm.bias"), "missing prior/prior_extractor.encoder.norm.bias"),
        (lambda s: s.update({"surprise": torch.zeros(1)}), r"unexpected surprise \[1\]"),
        (lambda s: s.update({"out_proj.bias": torch.zeros(3)}), r"out_proj.bias has the shape \[3\]"),
    ],
)
def test_strict(tmp_path: Path, change: Any, message: str) -> None:
    state = prior_state(trained=False)
    change(state)
    with pytest.raises(FailedError, match=message):
        convert(write_folder(tmp_path / "prior", state, SIZES), tmp_path / "out")
