"""Trains in children that are killed with SIGKILL at random moments, and then to the end.

torch is loaded once: every run is a fork of this process, which has no threads yet.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from javis.train.engine import EngineConfig, Trainer
from tests.train.engine_task import ToySource, ToyTask

STEPS = 350


def run(out: Path) -> None:
    config = EngineConfig(out=out, device="cpu", steps=STEPS, learning_rate=1e-2, save_every=5, keep=2, log_every=1)
    Trainer(ToyTask(noise=0.1), ToySource(), config).run()


def child(out: Path) -> int:
    number = os.fork()
    if number == 0:
        code = 1
        try:
            run(out)
            code = 0
        finally:
            os._exit(code)
    return number


def rows(out: Path) -> int:
    path = out / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(3)
    places: list[int] = []
    while len(places) < kills:
        before, number = rows(folder / "killed"), child(folder / "killed")
        # Sometimes at once, mostly after some steps: while a step runs, a file is written, a folder renamed or removed.
        wanted = before + chance.choice([0, 3, 8, 20])
        end = time.monotonic() + 60
        while rows(folder / "killed") < wanted and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(number, signal.SIGKILL)
        _, status = os.waitpid(number, 0)
        assert os.WIFSIGNALED(status), "the run came to its end before it was killed"
        places.append(rows(folder / "killed"))
        (folder / "places.json").write_text(json.dumps(places))
    for name in ("killed", "whole"):
        _, status = os.waitpid(child(folder / name), 0)
        assert status == 0, status


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
