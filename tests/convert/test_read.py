"""Foreign files: what is read, and what is refused without being run."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from javis.convert.read import Checkpoint
from javis.errors import UsageError

from .official import write_folder

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(3, dtype=torch.bfloat16)}


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def same(checkpoint: Checkpoint, state: dict[str, torch.Tensor] = STATE) -> None:
    assert sorted(checkpoint.names()) == sorted(state)
    for name, value in state.items():
        assert checkpoint.info(name).shape == tuple(value.shape) and checkpoint.info(name).dtype == value.dtype
        got = checkpoint.get(name)
        assert got.dtype == value.dtype and torch.equal(got, value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: OrderedDict(s),
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]}},
        lambda s: {"ema": {n: torch.nn.Parameter(v) for n, v in s.items()}},
        lambda s: {f"module.{n}": v for n, v in s.items()},
        lambda s: {"model": {f"_orig_mod.module.{n}": v for n, v in s.items()}},
        lambda s: s | {"iteration": 7},
    ],
    ids=["plain", "ordered", "state_dict", "model+optimizer", "ema", "module.", "wrapped twice", "number beside"],
)
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_pickles_of_tensors(tmp_path: Path, wrap: Any, suffix: str) -> None:
    torch.save(wrap(dict(STATE)), tmp_path / f"weights{suffix}")
    same(Checkpoint(tmp_path / f"weights{suffix}"))


def test_files_of_old_torch(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(Checkpoint(tmp_path / "old.pth"))


def test_two_sets_of_weights_need_a_choice(tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in STATE.items()}
    torch.save({"model": STATE, "ema": other}, tmp_path / "both.pth")
    with pytest.raises(UsageError, match=r"several: model, ema.*--entry"):
        Checkpoint(tmp_path / "both.pth")
    same(Checkpoint(tmp_path / "both.pth", "ema"), other)
    with pytest.raises(UsageError, match="no entry 'net'.*model, ema"):
        Checkpoint(tmp_path / "both.pth", "net")


@pytest.mark.parametrize("hide", ["alone", "beside tensors", "raw pickle", "old format", "as safetensors"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, hide: str) -> None:
    trace, file = tmp_path / "ran", tmp_path / "model.bin"
    evil = Malicious(trace)
    if hide == "raw pickle":
        file.write_bytes(pickle.dumps(evil))
    elif hide == "as safetensors":
        file = tmp_path / "model.safetensors"
        torch.save(evil, file)
    else:
        content = evil if hide == "alone" else STATE | {"payload": evil}
        torch.save(content, file, _use_new_zipfile_serialization=hide != "old format")
    with pytest.raises(
        UsageError, match="not a complete safetensors" if hide == "as safetensors" else "refused.*nothing"
    ):
        Checkpoint(file)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # the payload works: without the refusal the file would be there
    assert trace.exists()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("indexed", [True, False])
def test_safetensors_folders(tmp_path: Path, shards: int, indexed: bool) -> None:
    state = {f"layer.{i}": torch.randn(2, i + 1) for i in range(6)}
    folder = write_folder(tmp_path / "in", state, {"model_type": "x"}, shards)
    if not indexed:
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    opened = Checkpoint(folder)
    same(opened, state)
    assert opened.config == {"model_type": "x"} and len(opened.files) == shards


def test_pickled_shards_and_a_training_run(tmp_path: Path) -> None:
    inner = tmp_path / "run" / "model"
    inner.mkdir(parents=True)
    torch.save({"a.weight": STATE["a.weight"]}, inner / "pytorch_model-00001.bin")
    torch.save({"b.bias": STATE["b.bias"]}, inner / "pytorch_model-00002.bin")
    where = {"a.weight": "pytorch_model-00001.bin", "b.bias": "pytorch_model-00002.bin"}
    (inner / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "run" / "config.json").write_text('{"depth": 2}')
    opened = Checkpoint(tmp_path / "run")
    same(opened)
    assert opened.config == {"depth": 2}


def test_safetensors_before_pickles_and_the_usual_name_before_others(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", STATE)
    torch.save({"x": torch.zeros(1)}, tmp_path / "in" / "pytorch_model.bin")
    save_file({"y": torch.zeros(1)}, tmp_path / "in" / "model.fp16.safetensors")
    opened = Checkpoint(tmp_path / "in")
    same(opened)
    assert "took model.safetensors, not model.fp16.safetensors" in opened.notes


def bad_index(folder: Path, text: str) -> None:
    write_folder(folder, {"a": torch.zeros(2), "b": torch.zeros(2)}, shards=2)
    (folder / "model.safetensors.index.json").write_text(text)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.zeros(4) for i in range(9)}
    folder = write_folder(tmp_path / "in", state, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UsageError, match=r"lacks model-00002-of-00003.safetensors, which model.safetensors.index.json"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        UsageError, match=r"lacks model-00002-of-00003.safetensors, which the names of the other shards"
    ):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an index of weights"),
        ('{"metadata": {}}', "not an index of weights.*weight_map"),
        ('{"weight_map": {}}', "names no weights"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "expected names of weights files in the same folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "expected names of weights files in the same folder"),
        (
            '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", '
            '"c": "model-00002-of-00002.safetensors"}}',
            "names 1 tensors that are in no shard, such as 'c'",
        ),
    ],
)
def test_unusable_indices(tmp_path: Path, text: str, message: str) -> None:
    bad_index(tmp_path / "in", text)
    with pytest.raises(UsageError, match=message):
        Checkpoint(tmp_path / "in")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save(STATE, tmp_path / "model.pth")
    for name, message in (
        ("model.safetensors", "not a complete safetensors file"),
        ("model.pth", "cannot be read|refused"),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:keep])
        with pytest.raises(UsageError, match=message):
            Checkpoint(tmp_path / name)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "readme.txt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse.pth")
    write_folder(tmp_path / "config", STATE)
    (tmp_path / "config" / "config.json").write_text("{")
    for path, message in {
        "empty": "no weights in .*it holds nothing.*expected",
        "gone": "there is no .*gone; expected",
        "readme.txt": "not a weights file; expected one of .safetensors",
        "list.pth": "holds a list; expected a dictionary of tensors",
        "none.pth": "holds none",
        "sparse.pth": "'a' is a sparse",
        "config": "config.json is not json",
    }.items():
        with pytest.raises(UsageError, match=message):
            Checkpoint(tmp_path / path)
    with pytest.raises(UsageError, match="hf download"):
        Checkpoint("JavisVerse/JavisDiT-v0.1-jav")


def test_a_folder_of_several_models(tmp_path: Path) -> None:
    for name in ("vae", "vocoder"):
        write_folder(tmp_path / "audioldm2" / name, STATE)
    with pytest.raises(UsageError, match=r"folder of several models \(vae, vocoder\); convert one of these"):
        Checkpoint(tmp_path / "audioldm2")


def test_an_index_may_be_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", STATE, shards=2)
    same(Checkpoint(folder / "model.safetensors.index.json"))


def test_several_weights_without_a_usual_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match=r"several weights: one.safetensors, two.safetensors; name one"):
        Checkpoint(tmp_path)
