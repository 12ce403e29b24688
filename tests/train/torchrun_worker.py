"""A worker of torchrun that trains for long, and does what it is told when something happens."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from javis.train.engine import EngineConfig, Trainer
from tests.train.engine_task import ToySource, ToyTask

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Slow(ToySource):
    """``fail``: the second rank finds its data gone at batch 30."""

    fail = False

    def next(self) -> dict[str, Any]:
        time.sleep(0.005)
        if self.fail and RANK == 1 and self.number >= 30:
            raise OSError("the data is gone")
        return super().next()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)  # nothing may outlive the tests
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    (out / f"pid-{RANK}").write_text(str(os.getpid()))
    source = Slow(RANK, WORLD)
    source.fail = sys.argv[2] == "fail"
    config = EngineConfig(out=out, device="cpu", steps=100_000, log_every=1, save_every=10, learning_rate=1e-3)
    Trainer(ToyTask(), source, config).run()
