"""The training engine: a task, a source of batches and a configuration -> a trained module.

>>> Trainer(task, source, EngineConfig(out=Path("runs/x"), steps=1000)).run()
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from javis.train.engine_config import EngineConfig


class BatchSource(Protocol):
    """Batches of this process."""

    def next(self) -> dict[str, Any]:
        """This rank's batch of the next step (with accumulation: of the next part of one); the same after the same
        state, whatever happened in between. Tensors are moved to the device by the engine."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it is, json-able."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there. After a resume on another number of processes every rank is given the state of rank 0."""
        ...


class TrainTask(Protocol):
    """What is trained."""

    @property
    def module(self) -> nn.Module:
        """Its ``forward(batch)`` returns scalars, "loss" among them, a mean over the batch; all others are logged. Only
        parameters with ``requires_grad`` are optimised. Every process must run the same submodules in a step."""
        ...

    def blocks(self) -> list[nn.Module]:
        """Units of sharding and of activation checkpointing, in the order they run."""
        ...


class Callback(Protocol):
    """What happens beside training. ``on_log`` and ``on_save`` are called by rank 0."""

    def on_log(self, step: int, values: dict[str, float]) -> None:
        """Means over the steps since the last call: what ``forward`` returned, "norm", "lr", "seconds"."""
        ...

    def on_sample(self, step: int, module: nn.Module) -> None:
        """Called by every rank, with whole and averaged weights in ``module``, without gradients."""
        ...

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint is finished in ``folder``."""
        ...


def learning_rate(step: int, config: EngineConfig) -> float:
    """Rate of step ``step`` (from 0): linear warm-up, constant, then the fall of ``config.schedule``."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    begin = config.steps * (1 - config.decay)
    if config.schedule == "constant" or step < begin:
        return config.learning_rate * warm
    left = max(0.0, (config.steps - step) / (config.steps - begin))
    return config.learning_rate * warm * (left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


class Trainer:
    """Trains the module of ``task`` in place."""

    def __init__(
        self, task: TrainTask, source: BatchSource, config: EngineConfig, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.task, self.source, self.config, self.callbacks = task, source, config, tuple(callbacks)
        self.module, self.step = task.module, 0

    def run(self) -> None:
        """Train up to ``config.steps``."""
        c = self.config
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([p for _, p in named], lr=c.learning_rate, betas=c.betas, fused=True)
        sums: dict[str, float] = {}
        while self.step < c.steps:
            rate = learning_rate(self.step, c)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for _ in range(c.accumulation):
                losses: dict[str, Tensor] = self.module(self.source.next())
                (losses["loss"] / c.accumulation).backward()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / c.accumulation
            nn.utils.clip_grad_norm_([p for _, p in named], c.clip_gradient or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % c.log_every == 0 or self.step == c.steps:
                count = (self.step - 1) % c.log_every + 1
                for callback in self.callbacks:
                    callback.on_log(self.step, {name: value / count for name, value in sums.items()} | {"lr": rate})
                sums = {}


__all__ = ["BatchSource", "Callback", "EngineConfig", "TrainTask", "Trainer", "learning_rate"]
