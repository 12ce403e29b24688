"""One of two ranks: trains what test_engine_ranks.py compares with one process. Starting up is most of the time, so one
pair of processes does all of it."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from javis.errors import FailedError
from javis.train.engine import EngineConfig, Trainer
from tests.train.engine_task import FlowSource, FlowTask, ToySource, ToyTask

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

FLOW: dict[str, Any] = {
    "steps": 20, "accumulation": 2, "clip_gradient": 0.5, "learning_rate": 3e-3, "warmup": 4, "weight_decay": 0.1,
    "ema": 0.9, "log_every": 1, "save_every": 10, "keep": 5,
}  # fmt: skip
TOY: dict[str, Any] = {"steps": 12, "learning_rate": 1e-2, "ema": 0.9, "log_every": 1, "save_every": 4}


def flow(out: Path, callbacks: Any = (), *, layers: bool = False, **changes: Any) -> Trainer:
    """Two gradient accumulations of two samples a rank: the same four samples a part on any number of ranks."""
    task, source = FlowTask(layers=layers), FlowSource(RANK, WORLD)
    trainer = Trainer(task, source, EngineConfig(out=out, device="cpu", **(FLOW | changes)), callbacks)
    trainer.run()
    return trainer


def toy(out: Path, callbacks: Any = (), bad: tuple[int, ...] = (), **changes: Any) -> Trainer:
    source = ToySource(RANK, WORLD, bad=bad, bad_rank=WORLD - 1)
    # Every rank begins with weights of its own: those of rank 0 count.
    trainer = Trainer(ToyTask(seed=RANK), source, EngineConfig(out=out, device="cpu", **(TOY | changes)), callbacks)
    trainer.run()
    return trainer


class FillDisk:
    """At step 7 the space for the second rank's file of the next checkpoint is gone."""

    def __init__(self, checkpoints: Path) -> None:
        self.partial = checkpoints / "step_0000008.partial"

    def on_log(self, step: int, values: dict[str, float]) -> None:
        if step == 7:
            self.partial.mkdir()
            for number in (1, 2, 3):
                (self.partial / f"shard-00002-model-0000{number}-of-00003.safetensors").symlink_to("/dev/full")

    def on_sample(self, step: int, module: torch.nn.Module) -> None:
        """Ranks do different things: the weights are whole, nothing is exchanged."""
        if RANK == 1:
            module({"x": torch.ones(2, 6), "y": torch.ones(2)})

    def on_save(self, step: int, folder: Path) -> None: ...


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(150, exit=True)  # nothing may outlive the tests
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if WORLD > 1:
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, timeout=timedelta(seconds=60), rank=RANK, world_size=WORLD)
    flow(folder / "flow")
    flow(folder / "from_one")  # goes on from a checkpoint that one process wrote
    flow(folder / "hybrid", steps=4, replicas=2)
    flow(folder / "layers", steps=4, layers=True, activation_checkpointing="full")
    flow(folder / "low", steps=4, layers=True, precision="bf16", activation_checkpointing="selective")
    toy(folder / "full", [FillDisk(folder / "full" / "checkpoints")], sample_every=3)
    assert toy(folder / "skipped", bad=(3,)).guard.total == 1
    try:
        toy(folder / "stopped", bad=(5, 6, 7), max_nonfinite=3)
    except FailedError as error:
        (folder / f"stopped-{RANK}.txt").write_text(str(error))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
