"""All official files of a pipeline, converted into one folder, are the pipeline: same weights, same clip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from javis.convert import convert
from javis.model.checkpoint import to_official
from javis.pipeline import JavisPipeline

from .official import rope, write_folder

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def state(folder: Path) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        merged |= load_file(file)
    return merged


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def text_tower(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower under ImageBind's names, with what its files hold beside it."""
    named = {
        "token_embedding.weight": "modality_preprocessors.text.token_embedding.weight",
        "position_embedding": "modality_preprocessors.text.pos_embed",
    }
    tower = {named.get(n, n.replace("blocks.", "modality_trunks.text.blocks.", 1)): v for n, v in ours.items()}
    tower["modality_preprocessors.text.pos_embed"] = tower["modality_preprocessors.text.pos_embed"][None]
    tower["modality_heads.text.proj.1.weight"] = torch.zeros(4, 4)
    return tower


def write_official(saved: Path, root: Path) -> list[Path]:
    """What the hub would have of the pipeline in ``saved``: official names, some files pickled."""
    dit, told = state(saved / "transformer"), config(saved / "transformer")
    names = {"spatial_prior_len", "temporal_prior_len", "input_sq_size", "num_heads", "depth", "hidden_size"}
    official = to_official(dit) | {"rope.freqs": rope(told["hidden_size"] // told["num_heads"])}
    jav = write_folder(
        root / "jav", official, {n: told[n] for n in names} | {"st_prior_utilize": "cross_attn"}, shards=2
    )

    told = config(saved / "prior")
    tower = {f"text_encoder.{n}": v for n, v in text_tower(state(saved / "prior_text_encoder")).items()}
    heads = config(saved / "prior_text_encoder")["heads"]
    prior = write_folder(
        root / "prior",
        state(saved / "prior") | tower,
        {"nhead": told["num_heads"], "apply_sampling": True, "text_num_heads": heads, "out_dim": told["out_dim"]},
    )
    shutil.copy(saved / "prior_text_encoder" / "hash_tokenizer.json", prior)

    vae, told = state(saved / "video_vae"), config(saved / "video_vae")
    named = {
        f"spatial_vae.module.{n[6:]}" if n.startswith("image.") else f"temporal_vae.{n[9:]}": v for n, v in vae.items()
    }
    named |= {n: torch.tensor(told[n])[None, :, None, None, None] for n in ("shift", "scale")}
    groups = {part: {"num_groups": told["temporal"]["num_groups"], "norm_num_groups": told["image"]["norm_num_groups"]}
              for part in ("vae_temporal", "vae_2d")}  # fmt: skip
    video = write_folder(root / "vae", named, groups | {"micro_frame_size": 17})

    pickled = []
    for name in ("text_encoder", "audio_vae", "vocoder"):
        folder = root / name
        folder.mkdir()
        torch.save(state(saved / name), folder / "pytorch_model.bin")
        shutil.copy(saved / name / "config.json", folder)
        pickled.append(folder)
    shutil.copy(saved / "tokenizer" / "hash_tokenizer.json", root / "text_encoder")
    return [jav, prior, video, *pickled]


def test_the_converted_folder_is_the_pipeline(tmp_path: Path) -> None:
    made = JavisPipeline.with_random_weights("toy", seed=3, device="cpu")
    made.save_pretrained(tmp_path / "saved")
    for source in write_official(tmp_path / "saved", tmp_path):
        report = convert(source, tmp_path / "converted")
        assert not report.problems() and not report.absent, source
    again = JavisPipeline.from_pretrained(tmp_path / "converted", device="cpu")
    assert set(again.description["components"]) >= {"transformer", "prior", "video_vae", "audio_vae", "text_encoder"}
    for name, component in made.components.items():
        other = again.components[name]
        if isinstance(component, torch.nn.Module):
            own, loaded = component.state_dict(), other.state_dict()
            assert own.keys() == loaded.keys() and all(torch.equal(own[n], loaded[n]) for n in own), name
    clips = [pipe("a dog barks", seed=1, steps=2, seconds=0.5, resolution="64x64") for pipe in (made, again)]
    assert np.array_equal(clips[0].video, clips[1].video) and np.array_equal(clips[0].audio, clips[1].audio)
