"""Official DiT checkpoints (jav, audio, STDiT-v3) at several depths: every name finds its place, values unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from javis.convert import convert
from javis.convert.dit import plan_dit
from javis.convert.kinds import detect
from javis.convert.read import TensorInfo
from javis.errors import FailedError
from javis.model.checkpoint import to_official
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from tests.golden.harness import golden_dir

from .official import AUDIO, JAV, STDIT3, derive, dit_shapes, dit_state, names_file, write_folder

OFFICIAL = {  # config.json of the hub, as far as it tells sizes
    "model_type": "VASTDiT3",
    "architectures": ["VASTDiT3"],
    "st_prior_utilize": "cross_attn",
    "input_sq_size": 512,
    "qk_norm": True,
    "train_st_prior_attn": True,
    "train_va_cross_attn": True,
    "enable_flash_attn": True,
    "freeze_video_branch": True,
}


def read(folder: Path) -> tuple[JavisDiTConfig, dict[str, torch.Tensor]]:
    """The transformer of a converted folder, read by hand."""
    config = JavisDiTConfig.from_dict(json.loads((folder / "config.json").read_text()))
    state: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    return config, state


class Shapes:
    """A source of which only names and shapes exist."""

    config: dict[str, Any] | None = None
    notes: list[str] = []  # noqa: RUF012
    folder = Path()

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def names(self) -> list[str]:
        return list(self.shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.shapes[name], torch.bfloat16)

    def get(self, name: str) -> torch.Tensor:
        return torch.zeros(1)


def test_names_are_those_of_the_golden_cases() -> None:
    if not (golden_dir() / "dit.json").exists():
        pytest.skip(f"no golden cases in {golden_dir()}")
    assert names_file() == derive(golden_dir())


@pytest.mark.parametrize("mode", ["cross_attn", "addition", "modulate"])
@pytest.mark.parametrize("depth", [1, 3])
def test_round_trip(tmp_path: Path, depth: int, mode: str) -> None:
    state = dit_state(depth=depth, mode={"cross_attn": "dit"}.get(mode, mode))
    official = OFFICIAL | {"spatial_prior_len": 3, "temporal_prior_len": 2, "st_prior_utilize": mode, "depth": depth}
    source = write_folder(tmp_path / "jav", state, official, shards=2)
    report = convert(source, tmp_path / "out")
    config, ours = read(tmp_path / "out" / "transformer")
    assert (config.depth, config.hidden_size, config.num_heads, config.prior_mode) == (depth, 32, 2, mode)
    assert (config.spatial_prior_len, config.temporal_prior_len, config.prior_channels) == (3, 2, 8)
    JavisDiT(config).load_state_dict(ours, strict=True)
    back = to_official(ours)
    assert set(back) == set(state) - {"rope.freqs"}
    assert all(torch.equal(back[name], state[name]) for name in back)
    assert len(report.renamed) == len(report.used) - sum(n in state for n in ours)
    assert [row["source"] for row in report.ignored] == ["rope.freqs"] and not report.problems()
    assert report.components["transformer"]["assumed"] == {}
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["components"] == {"transformer": "JavisDiT"}


def test_full_size_from_shapes_alone() -> None:
    """28 layers of width 1152, without their memory: the configuration is the default, and every name has a place."""
    shapes = dit_shapes(JAV, depth=28, width=1152, heads=16, caption=(300, 4096), prior=(64, 128))
    plan = plan_dit(Shapes(shapes), detect(Shapes(shapes), "jav"))
    (component,) = plan.components
    assert JavisDiTConfig.from_dict(component.config) == JavisDiTConfig()
    assert set(component.assumed) == {"input_sq_size", "spatial_prior_len", "temporal_prior_len"}
    assert not component.conflicts and len(shapes) == len(component.expected) == 37 + 28 * 116
    assert {name: shapes[component.sources[name]] for name in component.expected} == component.expected


@pytest.mark.parametrize(("gone", "kept"), [("audio_y_embedder", "y_embedder"), ("y_embedder", "audio_y_embedder")])
def test_null_captions_that_share_memory_may_be_stored_once(tmp_path: Path, gone: str, kept: str) -> None:
    state = dit_state(depth=1, prior=(6, 8))
    del state[f"{gone}.y_embedding"]
    report = convert(write_folder(tmp_path / "jav", state), tmp_path / "out")
    _, ours = read(tmp_path / "out" / "transformer")
    assert torch.equal(ours["embed.video_text.null"], state[f"{kept}.y_embedding"])
    assert torch.equal(ours["embed.audio_text.null"], state[f"{kept}.y_embedding"])
    assert [row["target"].split(".")[1] for row in report.used if row["tied"]] == [
        "audio_text" if gone.startswith("audio") else "video_text"
    ]


def test_a_shared_storage_of_a_pickle_is_written_twice(tmp_path: Path) -> None:
    state = dit_state(depth=1)
    state["audio_y_embedder.y_embedding"] = state["y_embedder.y_embedding"]
    torch.save({"ema": state}, tmp_path / "jav.pth")
    convert(tmp_path / "jav.pth", tmp_path / "out")
    _, ours = read(tmp_path / "out" / "transformer")
    assert torch.equal(ours["embed.video_text.null"], ours["embed.audio_text.null"])


def test_the_audio_branch_then_the_video_branch(tmp_path: Path) -> None:
    """The two ancestors of the joint model; together they are a model without priors and cross attention."""
    audio, video = dit_state(AUDIO, seed=1), dit_state(STDIT3, seed=2)
    report = convert(write_folder(tmp_path / "a", audio), tmp_path / "out", dtype="bfloat16")
    assert report.kind == "audio" and not report.missing
    assert {row["target"].split(".")[2] for row in report.absent} == {"video_spatial", "video_temporal"}
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["components"] == {}, "half a transformer is no component"

    report = convert(write_folder(tmp_path / "v", video), tmp_path / "out", merge=True, dtype="bfloat16")
    assert not report.absent and not report.problems()
    config, ours = read(tmp_path / "out" / "transformer")
    assert not config.use_prior and not config.use_bidirectional and config.audio_patch == (4, 1)
    JavisDiT(config).load_state_dict(ours, strict=True)
    back = to_official(ours)
    assert set(back) == (set(audio) | set(video)) - {"rope.freqs"}
    for name, value in back.items():
        assert torch.equal(value, (video if name in video else audio)[name].bfloat16()), name
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["components"] == {"transformer": "JavisDiT"}


def test_stdit3_says_what_the_audio_branch_lacks(tmp_path: Path) -> None:
    report = convert(write_folder(tmp_path / "v", dit_state(STDIT3, depth=2)), tmp_path / "out")
    assert report.kind == "stdit3" and not report.missing
    lacks = {row["target"] for row in report.absent}
    expected = JavisDiT(JavisDiTConfig.from_dict(report.components["transformer"]["config"])).state_dict()
    assert lacks == {name for name in expected if "audio" in name}
    assert {row["target"] for row in report.used} == set(expected) - lacks


def test_the_folder_name_tells_240p4s(tmp_path: Path) -> None:
    state = dit_state(depth=1)
    for name, kind in (("JavisDiT-v0.1-jav", "jav"), ("JavisDiT-v0.1-jav-240p4s", "jav-240p4s")):
        report = convert(write_folder(tmp_path / name, state), tmp_path / f"out-{kind}")
        assert report.kind == kind
    assert json.loads((tmp_path / "out-jav-240p4s" / "model_index.json").read_text())["clip"] == {
        "resolution": "240p",
        "seconds": 4.0,
    }


def change(state: dict[str, torch.Tensor], what: str) -> None:
    name = "spatial_blocks.0.mlp.fc2.weight"
    if what == "missing":
        del state[name]
    elif what == "unexpected":
        state["onset_embedder.mlp.0.weight"] = torch.zeros(2, 2)
    elif what == "shape":
        state[name] = state[name][:, :-1].contiguous()
    elif what == "layer":
        for key in [key for key in state if key.startswith("va_cross_blocks.1.")]:
            del state[key]
    elif what == "rope":
        state["rope.freqs"] = state["rope.freqs"] * 1.1
    elif what == "nan":
        state[name] = state[name].index_fill(0, torch.tensor([0]), float("nan"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"missing transformer/layers.0.video_spatial.mlp.fc2.weight \[32, 128\]"),
        ("unexpected", r"unexpected onset_embedder.mlp.0.weight \[2, 2\]"),
        ("shape", r"spatial_blocks.0.mlp.fc2.weight has the shape \[32, 127\], .* needs \[32, 128\]"),
        ("layer", r"missing transformer/layers.1.bidirectional.*and 10 more"),
        ("rope", r"rope.freqs are not 10000\^\(-2i/16\)"),
        ("nan", r"spatial_blocks.0.mlp.fc2.weight: has values that are NaN"),
    ],
)
def test_strict_by_default(tmp_path: Path, what: str, message: str) -> None:
    state = dit_state()
    change(state, what)
    source = write_folder(tmp_path / "jav", state)
    with pytest.raises(FailedError, match=message) as caught:
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing may be left"
    account = tmp_path / "out.conversion.json"
    assert str(account) in str(caught.value) and "--no-strict" in str(caught.value)
    said = json.loads(account.read_text())
    kinds = {
        "missing": "missing",
        "unexpected": "unexpected",
        "shape": "mismatched",
        "layer": "missing",
        "nan": "broken",
    }
    assert said["counts"][kinds[what]] == {"layer": 14}.get(what, 1) if what != "rope" else said["conflicts"]

    report = convert(source, tmp_path / "out", strict=False)
    assert report.written and len(report.problems()) >= 1
    _, ours = read(tmp_path / "out" / "transformer")
    assert set(ours) == {row["target"] for row in report.used}
    complete = what not in ("missing", "shape", "layer")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert ("transformer" in index["components"]) == complete


def test_a_config_that_contradicts_the_weights(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "jav", dit_state(), {"depth": 28, "hidden_size": 32, "num_heads": 2})
    with pytest.raises(FailedError, match="config.json says depth 28, the weights have 2"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", strict=False)
    assert read(tmp_path / "out" / "transformer")[0].depth == 2
