"""Checkpoints of a run in one process: resumed, kept, damaged, without space."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from javis.bench_environment import environment
from javis.errors import FailedError, UsageError
from javis.train.distributed_checkpoint import finished, read_weights, why_not
from javis.train.engine import Trainer
from javis.train.run_folder import RunFolder

from .engine_runs import Watcher, interrupted, settings, train
from .engine_task import ToySource, ToyTask, rows


@pytest.mark.parametrize("changes", [{}, {"log_every": 3, "save_every": 4}, {"sharding": "fsdp"}])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Generators of python, numpy and torch, moments, averages, data, means of the log that were half done."""
    train(tmp_path / "whole", **changes)
    interrupted(tmp_path / "broken", 9, async_save=False, **changes)
    assert [path.name for path in finished(tmp_path / "broken" / "checkpoints")] == ["step_0000008", "step_0000004"]
    trainer = train(tmp_path / "broken", ToyTask(noise=0.1, seed=5), **changes)
    assert trainer.step == 12
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    a, b = (read_weights(tmp_path / name) for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    train(tmp_path / "broken", **changes)  # finished: nothing is done twice
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_the_newest_are_kept_and_hold_the_configuration(tmp_path: Path) -> None:
    watcher = Watcher()
    c = settings(tmp_path, save_every=2, keep=2)
    Trainer(ToyTask(), ToySource(), c, [watcher], resolved={"recipe": "toy"}).run()
    assert watcher.saved == [2, 4, 6, 8, 10, 12]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_0000010", "step_0000012"]
    for folder in (tmp_path, tmp_path / "checkpoints" / names[0]):
        told = json.loads((folder / "config.json").read_text())
        assert told["recipe"] == "toy" and told["engine"]["steps"] == 12
        assert told["environment"].keys() == environment().keys()  # device, versions and commit, which a report shows
    newest = tmp_path / "checkpoints" / names[1]
    assert {path.suffix for path in newest.iterdir()} == {".json", ".safetensors"}
    assert why_not(newest) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def copy(path: Path) -> None:
    """A shard of another checkpoint got among these."""
    path.with_name("shard-00009-model-00001-of-00003.safetensors").write_bytes(path.read_bytes())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("shard-*", cut, "bytes instead of"),
        ("shard-*", flip, "has changed since"),
        ("shard-*", Path.unlink, "is missing"),
        ("shard-*", copy, "is not one of its files"),
        ("state.json", flip, "has changed since"),
        ("checkpoint.json", cut, "JSONDecodeError"),
        ("checkpoint.json", Path.unlink, "FileNotFoundError"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Any, said: str
) -> None:
    train(tmp_path / "whole")
    interrupted(tmp_path / "run", 9, async_save=False)
    damage(sorted((tmp_path / "run" / "checkpoints" / "step_0000008").glob(name))[0])
    with caplog.at_level(logging.INFO, "javis.train"):
        train(tmp_path / "run")
    assert "step_0000008 is not usable" in caplog.text and said in caplog.text
    assert "going on from step_0000004" in caplog.text
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert why_not(tmp_path / "run" / "checkpoints" / "step_0000008") is None


def test_nothing_is_begun_anew_where_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    train(tmp_path)
    for folder in finished(tmp_path / "checkpoints"):
        cut(folder / "state.json")
    with pytest.raises(FailedError, match="none of the 3 checkpoints"):
        train(tmp_path)
    assert len(rows(tmp_path)) == 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_one_checkpoint_and_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel refuses the bytes: the checkpoint's file is a link to a device without space."""

    def fill(step: int, _: Any) -> None:
        partial = tmp_path / "run" / "checkpoints" / "step_0000008.partial"
        if step == 7:
            partial.mkdir()
            for number in (1, 2, 3):
                (partial / f"shard-00001-model-0000{number}-of-00003.safetensors").symlink_to("/dev/full")

    train(tmp_path / "whole")
    watcher = Watcher(log=fill)
    with caplog.at_level(logging.INFO, "javis.train"):
        Trainer(ToyTask(noise=0.1), ToySource(), settings(tmp_path / "run"), [watcher]).run()
    assert "step_0000008 could not be written: OSError on rank 0: [Errno 28] No space left" in caplog.text
    assert watcher.saved == [4, 12]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_0000004", "step_0000012"]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_last_checkpoint_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    def fill(step: int, _: Any) -> None:
        if step == 11:
            partial = tmp_path / "checkpoints" / "step_0000012.partial"
            partial.mkdir()
            (partial / "state.json").symlink_to("/dev/full")

    with pytest.raises(FailedError, match="the last checkpoint could not be written: OSError"):
        Trainer(ToyTask(), ToySource(), settings(tmp_path), [Watcher(log=fill)]).run()
    assert finished(tmp_path / "checkpoints")[0].name == "step_0000008"


def test_checkpoints_of_another_model_are_refused_and_kept(tmp_path: Path) -> None:
    train(tmp_path)
    task = ToyTask()
    task.module.last = nn.Linear(5, 2)
    with pytest.raises(UsageError, match=r"model.last.weight is \(1, 5\), here it is \(2, 5\)"):
        train(tmp_path, task)
    assert len(finished(tmp_path / "checkpoints")) == 3 and len(rows(tmp_path)) == 12


def test_no_pickle_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a checkpoint in one process opens safetensors and json; anything else would raise here."""
    import pickle

    interrupted(tmp_path, 9, async_save=False)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    train(tmp_path)
    read_weights(tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("javis.train.run_folder.PATIENCE", 0.2)
    alone: Any = SimpleNamespace(rank=0, from_first=lambda value: value)
    with RunFolder(tmp_path, {}, alone), pytest.raises(UsageError, match="another process trains in"):
        train(tmp_path)
    train(tmp_path)
