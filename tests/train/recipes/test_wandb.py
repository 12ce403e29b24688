"""Weights & Biases for real, without a network: what a training run logs is what its offline folder holds.

The package is no part of the development environment (62 MB, with a binary of its own): ``pip install wandb`` first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from javis.cli import main
from javis.errors import UsageError
from javis.train.recipes.task import FlowModule
from javis.train.recipes.watch import Board

from .small import small_model

wandb = pytest.importorskip("wandb", reason="the package wandb is not installed (pip install wandb)")

BLOCK = 32768  # bytes; the file is a log of LevelDB: records, or their parts, that cross no block


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No login and no files outside of ``tmp_path``."""
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


def records(path: Path) -> Iterator[Any]:
    """The records of a run's .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""  # seven bytes name the format
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def logged(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Configuration and history of the only run below ``folder``."""
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    config: dict[str, Any] = {}
    history = []
    for record in records(path):
        kind = record.WhichOneof("record_type")
        updates = {"run": record.run.config.update, "config": record.config.update}.get(kind, [])
        config |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}
        if kind == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append(row)
    return config, history


def test_a_training_run_logs_what_its_log_says(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick = ["--batch", "1", "--steps", "2", "--log-every", "1", "--device", "cpu", "--seconds", "0.5"]
    recipe = ["--init", str(checkpoint), "--data", "world", "--out", str(out), "--wandb", "demo", "--no-tensorboard"]
    assert main(["train", "joint", *recipe, *quick]) == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    config, history = logged(out)
    assert config["stage"] == "joint" and config["steps"] == 2 and config["draws"]["drop_text"] == 0.1
    assert [row["_step"] for row in history] == [row["step"] for row in rows] == [1, 2]
    for seen, row in zip(history, rows, strict=True):
        for name in ("loss", "video", "audio", "lr", "norm"):
            assert seen[f"train/{name}"] == pytest.approx(row[name])
        assert any(name.startswith("loss_by_timestep/") for name in seen)
    assert not (tmp_path / "wandb").exists()  # everything that a run writes is in its folder


def test_without_login_or_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="WANDB_MODE=offline"):
        Board(None, FlowModule(small_model(), "joint"), project="demo", out=tmp_path / "run")
