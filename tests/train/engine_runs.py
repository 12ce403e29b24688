"""Runs of the engine in this process, for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from javis.train.engine import EngineConfig, Trainer

from .engine_task import ToySource, ToyTask


def settings(out: Path, **changes: Any) -> EngineConfig:
    told: dict[str, Any] = {
        "out": out, "steps": 12, "device": "cpu", "learning_rate": 1e-2, "log_every": 1, "save_every": 4, "ema": 0.9,
    }  # fmt: skip
    return EngineConfig(**(told | changes))


def train(out: Path, task: Any = None, source: Any = None, **changes: Any) -> Trainer:
    trainer = Trainer(task or ToyTask(noise=0.1), source or ToySource(), settings(out, **changes))
    trainer.run()
    return trainer


class Watcher:
    """A callback that does what a test asks of it."""

    def __init__(self, log: Any = None, sample: Any = None, save: Any = None) -> None:
        self.saved: list[int] = []
        self.log, self.sample, self.save = log, sample, save

    def on_log(self, step: int, values: dict[str, float]) -> None:
        if self.log:
            self.log(step, values)

    def on_sample(self, step: int, module: nn.Module) -> None:
        if self.sample:
            self.sample(step, module)

    def on_save(self, step: int, folder: Path) -> None:
        self.saved.append(step)
        if self.save:
            self.save(step, folder)


class Stop(Exception):
    pass


def stopping(at: int) -> Watcher:
    def raise_at(step: int, _: Any) -> None:
        if step == at:
            raise Stop

    return Watcher(log=raise_at)


def interrupted(out: Path, at: int, **changes: Any) -> None:
    with pytest.raises(Stop):
        Trainer(ToyTask(noise=0.1), ToySource(), settings(out, **changes), [stopping(at)]).run()
