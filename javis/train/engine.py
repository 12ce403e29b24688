"""The training engine: a task, a source of batches and a configuration -> a trained module.

>>> Trainer(task, source, EngineConfig(out=Path("runs/x"), steps=1000)).run()

Read `Trainer.run` and `Trainer._step` first; then sharding.py (weights over processes), optimizers.py (AdamW and
averages on shards), distributed_checkpoint.py (what is on the disk). What it promises is in docs/training.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from javis.bench_environment import environment
from javis.errors import FailedError, UsageError
from javis.parallel.ranks import Rank, data_place
from javis.train.distributed_checkpoint import Checkpoints, entries
from javis.train.engine_config import EngineConfig
from javis.train.nonfinite import NonFiniteGuard
from javis.train.optimizers import ShardedAdamW, ShardedEma
from javis.train.processes import Processes, StopRequest, leave_with_parent, same_weights
from javis.train.random_state import kept_random_state, random_state, seed_everything, set_random_state
from javis.train.run_folder import RunFolder
from javis.train.sharding import (
    LOW_PRECISION,
    checkpoint_activations,
    is_sharded,
    make_sequence_mesh,
    make_training_mesh,
    shard,
    synchronise_gradients,
    whole,
)
from javis.train.shared_source import SharedSource


class BatchSource(Protocol):
    """Batches of this process; with ``sequence_parallel`` of all processes that share its clips (`data_place`)."""

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
        """Units of sharding and of activation checkpointing, in the order they run. Each is called by its ``forward``:
        layers of JavisDiT, or its `javis.train.sharding.called_blocks` if ``condition`` and ``denoise`` are called."""
        ...


class SharingTask(TrainTask, Protocol):
    """A task that can be trained with ``sequence_parallel``."""

    def share_tokens(self, group: ProcessGroup) -> Callable[[], object]:
        """Let ``forward`` of the module share its tokens with the ranks of ``group``, which are given the same batch;
        what is returned undoes it. Each must return the loss of the whole batch; the gradients that it leaves are its
        share, of which the engine makes the sum."""
        ...


class Callback(Protocol):
    """What happens beside training. ``on_log`` and ``on_save`` are called by rank 0."""

    def on_log(self, step: int, values: dict[str, float]) -> None:
        """Means over the steps since the last call: what ``forward`` returned, "norm", "lr", "seconds", "skipped"."""
        ...

    def on_sample(self, step: int, module: nn.Module) -> None:
        """Called by every rank, with whole and averaged weights in ``module``, without gradients. What it draws from
        the random generators changes nothing afterwards."""
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


def to_device(value: Any, device: torch.device) -> Any:
    """The tensors in nested dicts, lists and tuples, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(below, device) for key, below in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(to_device(below, device) for below in value)
    return value


class Trainer:
    """Trains the module of ``task`` in place, on all processes that torchrun started, or on this one.

    Args:
        task, source: see `TrainTask` and `BatchSource`; every rank has its own.
        config: the engine's part of the configuration.
        callbacks: see `Callback`.
        resolved: the whole configuration of the run, for ``config.json``; json-able, or with str() for what is not.

    Raises:
        UsageError: what cannot run here, a folder in use, or checkpoints of something else.
        FailedError: losses or gradients that stay non-finite, a last checkpoint that could not be written.
    """

    def __init__(
        self,
        task: TrainTask,
        source: BatchSource,
        config: EngineConfig,
        callbacks: Sequence[Callback] = (),
        *,
        resolved: Mapping[str, Any] | None = None,
    ) -> None:
        if config.sequence_parallel > 1 and not hasattr(task, "share_tokens"):
            raise UsageError(f"{type(task).__name__} cannot share the tokens of a clip; use sequence_parallel 1")
        self.task, self.config, self.callbacks = task, config, tuple(callbacks)
        self.source: BatchSource = source
        self.resolved = {"engine": dataclasses.asdict(config)} | dict(resolved or {})
        self.module, self.step, self.seconds = task.module, 0, 0.0
        self.window: dict[str, float] = {}  # sums since the last row of the log
        self.guard = NonFiniteGuard(config.max_nonfinite)
        self.stop = StopRequest()

    # -- the course of a run ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train up to ``config.steps``, from the newest usable checkpoint if there is one."""
        leave_with_parent()
        with self.stop.listening(), ExitStack() as stack:
            self._prepare(stack)
            stack.push(self._end)
            self._resume()
            began = time.perf_counter() - self.seconds
            while self.step < self.config.steps:
                stop = self._step()
                self.seconds = time.perf_counter() - began
                self._after_step()
                if stop:
                    self._save(wait=True)
                    break
            self._finish_save(wait=True)
            if self.step >= self.config.steps and self.checkpoints.failed is not None:
                raise FailedError(f"the last checkpoint could not be written: {self.checkpoints.failed}")

    def _end(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the checkpoint in work become finished.

        After an error on one rank there is nobody to do that with: torchrun ends the others.
        """
        if self._together(kind):
            self.checkpoints.poll(wait=True)

    def _leave(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._together(kind):
            self.processes.close()

    def _together(self, kind: type[BaseException] | None) -> bool:
        return self.processes.world == 1 or kind is None or issubclass(kind, FailedError)

    def _prepare(self, stack: ExitStack) -> None:
        c = self.config
        cuda = c.device != "cpu" and torch.cuda.is_available()
        needed = c.sharding == "fsdp" or (c.sharding == "auto" and (cuda or c.precision in LOW_PRECISION))
        self.processes = p = Processes(c.device, needed=needed)
        stack.push(self._leave)  # also if what follows cannot run here
        self.sharded = is_sharded(c, p.world, p.device)
        told = self.resolved | {"environment": environment(p.device.type)} if p.rank == 0 else self.resolved
        self.folder = stack.enter_context(RunFolder(c.out, told, p))
        self.place = data_place(Rank(p.rank, p.world), c.sequence_parallel)
        seed_everything(c.seed + self.place.rank)
        self.module.to(p.device)
        same_weights(self.module, p)
        blocks = self.task.blocks()
        if c.precision in ("fp8", "fp8-te"):
            from javis.train.fp8_training import train_in_fp8

            train_in_fp8(blocks, c.precision, p.device)
        if c.sequence_parallel > 1:
            group = make_sequence_mesh(p.world, c.sequence_parallel, p.device).get_group("seq")
            stack.callback(cast(SharingTask, self.task).share_tokens(group))
            self.source = SharedSource(self.source, group, p.device)
        stack.callback(checkpoint_activations(blocks, c))
        if self.sharded:
            shard(self.module, blocks, make_training_mesh(p.world, c.replicas, p.device), c)
        # Kept from here on: while a forward pass runs, FSDP2 shows the gathered ones instead.
        self.parameters = dict(self.module.named_parameters())
        self.trained = [(name, x) for name, x in self.parameters.items() if x.requires_grad]
        if not self.trained:
            raise UsageError("nothing to train: no parameter of the task's module has requires_grad")
        saved = self.module.state_dict().keys()
        self.buffers = [name for name, _ in self.module.named_buffers() if name in saved]
        self.optimizer = ShardedAdamW(self.trained, c, p.device)
        self.ema = ShardedEma(self.trained, c.ema) if c.ema > 0 else None
        self.checkpoints = Checkpoints(c.out / "checkpoints", c.keep, p)

    def _after_step(self) -> None:
        c, last = self.config, self.step == self.config.steps
        if self.step % c.log_every == 0 or last:
            self._log()
        if c.sample_every and (self.step % c.sample_every == 0 or last):
            self._sample()
        self._finish_save(wait=False)
        if last or (c.save_every and self.step % c.save_every == 0):
            self._save(wait=last or not c.async_save)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """One step of the optimizer, or a skipped one; whether any process was asked to stop."""
        c, p = self.config, self.processes
        # Reduced gradients are means over all processes. Those that share clips have shares of a sum.
        scale = c.sequence_parallel / c.accumulation
        values: dict[str, Any] = {}
        parts: list[tuple[dict[str, Any], Tensor]] = []
        for part in range(c.accumulation):
            batch = self.source.next()
            synchronise_gradients(self.module, part == c.accumulation - 1)
            with torch.autocast(p.device.type, torch.bfloat16, enabled=c.precision == "autocast"):
                losses: dict[str, Tensor] = self.module(to_device(batch, p.device))
            (losses["loss"] * scale).backward()
            parts.append((batch, losses["loss"].detach().isfinite()))
            for name, value in losses.items():
                values[name] = values.get(name, 0.0) + value.detach().double() / c.accumulation
        gradients = [x.grad for _, x in self.trained if x.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(p.device)
        # One exchange says everything: mean losses, whether all are finite, whether any process is to stop.
        finite = torch.stack([fine for _, fine in parts]).all()
        stop = torch.tensor(float(bool(self.stop)), device=p.device)
        told = torch.stack([*values.values(), norm.double(), (~finite).double(), stop.double()])
        *means, norm_mean, bad, stops = (p.sum_(told) / p.world).tolist()
        rate, folder = learning_rate(self.step, c), c.out / "nonfinite"
        self.step += 1
        if stops and not self.stop:
            self.stop.by_another()
        if bad or not math.isfinite(norm_mean):
            self.optimizer.zero_grad()
            suspect = next((batch for batch, fine in parts if not fine), parts[-1][0])
            self.guard.skipped(self.step, "the loss is" if bad else "the gradient is", suspect, folder, p.rank)
            return bool(stops)
        self.guard.taken()
        if c.clip_gradient:
            nn.utils.clip_grads_with_norm_([x for _, x in self.trained], c.clip_gradient, norm)
        self.optimizer.step(rate)
        if self.ema is not None:
            self.ema.update()
        row = {**dict(zip(values, means, strict=True)), "norm": norm_mean, "lr": rate, "steps": 1.0}
        self.window = {name: self.window.get(name, 0.0) + value for name, value in row.items()}
        return bool(stops)

    def _log(self) -> None:
        window, self.window = self.window, {}
        count = window.pop("steps", 0.0)
        if self.processes.rank == 0:
            values = {name: value / count for name, value in window.items()}
            values |= {"seconds": round(self.seconds, 2), "skipped": float(self.guard.total)}
            self.folder.log(self.step, values)
            for callback in self.callbacks:
                callback.on_log(self.step, values)

    def _sample(self) -> None:
        modes = {part: part.training for part in self.module.modules()}
        with ExitStack() as stack:
            stack.enter_context(kept_random_state())
            stack.enter_context(torch.no_grad())
            if self.ema is not None:
                stack.enter_context(self.ema.swapped())
            if self.sharded:
                stack.enter_context(whole(self.module))
            self.module.eval()
            for callback in self.callbacks:
                callback.on_sample(self.step, self.module)
        for part, mode in modes.items():
            part.training = mode

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        buffers = dict(self.module.named_buffers())
        weights = {name: x.detach() for name, x in self.parameters.items()} | {n: buffers[n] for n in self.buffers}
        found = {f"model.{name}": x for name, x in weights.items()}
        return found | ({} if self.ema is None else {f"ema.{name}": x for name, x in self.ema.state().items()})

    def _save(self, *, wait: bool) -> None:
        self._finish_save(wait=True)
        moments, groups = self.optimizer.state()
        ranks = self.processes.gathered({"random": random_state(), "source": self.source.state_dict()})
        state = {
            "ranks": ranks,
            "optimizer": groups,
            "ema_updates": 0 if self.ema is None else self.ema.updates,
            "skipped": [self.guard.total, self.guard.in_a_row],
            "window": self.window,
            "seconds": self.seconds,
            "sequence_parallel": self.config.sequence_parallel,
        }
        tensors = self._tensors() | {f"optimizer.{name}": x for name, x in moments.items()}
        texts = {"state.json": json.dumps(state), "config.json": self.folder.config_text}
        self.checkpoints.save(self.step, tensors, texts, {"processes": self.processes.world})
        self.folder.flush()
        self._finish_save(wait=wait)

    def _finish_save(self, *, wait: bool) -> None:
        done = self.checkpoints.poll(wait=wait)
        if done is not None and self.processes.rank == 0:
            for callback in self.callbacks:
                callback.on_save(int(done.name.partition("_")[2]), done)

    def _resume(self) -> None:
        """Go on from the newest usable checkpoint; rows of the log that come after it are dropped."""
        found = self.checkpoints.newest()
        if found is None:
            self.folder.begin_log(0)
            return
        there = {name: shape for name, (shape, _) in entries(found).items()}
        tensors = self._tensors()
        for name, x in tensors.items():
            if there.get(name) != tuple(x.shape):
                raise UsageError(
                    f"checkpoint {found} is of another training: {name} is {there.get(name, 'not in it')}, here it is "
                    f"{tuple(x.shape)}; choose another --out, or the model and the freezing it was made with"
                )
        kept = "optimizer."
        moments = self.optimizer.blank({n.removeprefix(kept): s for n, s in there.items() if n.startswith(kept)})
        self.checkpoints.load(found, tensors | {kept + name: x for name, x in moments.items()})
        state = json.loads((found / "state.json").read_text(encoding="utf-8"))
        self.optimizer.load(moments, state["optimizer"])
        if self.ema is not None:
            self.ema.updates = state["ema_updates"]
        self.step = int(json.loads((found / "checkpoint.json").read_text(encoding="utf-8"))["step"])
        self.guard.total, self.guard.in_a_row = state["skipped"]
        self.window, self.seconds = state["window"], state["seconds"]
        shares, (rank, world, _) = state["ranks"][:: state.get("sequence_parallel", 1)], self.place
        same = len(shares) == world
        if same:
            set_random_state(shares[rank]["random"])
        else:  # what each share would have drawn cannot be known; it is new, and the same in every such resume
            seed_everything(hash((self.config.seed, self.step, world)) % 2**31 + rank)
        self.source.load_state_dict(shares[rank if same else 0]["source"])
        self.folder.begin_log(self.step)
        self.folder.say_resumed(found, self.step, len(state["ranks"]))


__all__ = ["BatchSource", "Callback", "EngineConfig", "TrainTask", "Trainer", "learning_rate", "to_device"]
