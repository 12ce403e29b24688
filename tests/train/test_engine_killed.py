"""Nothing lost: killed at random moments, left behind by a parent, asked to stop."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from javis.train.distributed_checkpoint import finished, read_weights, why_not

from ..parallel.processes import Process, wait_all
from .engine_task import rows
from .killed import STEPS


@pytest.mark.slow
def test_killed_ten_times_the_losses_are_those_of_a_run_that_was_not(tmp_path: Path) -> None:
    """SIGKILL; the curve, weights and averages are bit-identical."""
    process = Process(["-m", "tests.train.killed", str(tmp_path), "10"], tmp_path / "out.log", {})
    assert wait_all([process], 100) == [0], process.output[-3000:]
    places = json.loads((tmp_path / "places.json").read_text())
    assert len(places) == 10 and 0 < places[-1] < STEPS and len(set(places)) > 4, places
    assert len(rows(tmp_path / "whole")) == STEPS
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    a, b = (read_weights(tmp_path / name) for name in ("killed", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == [path.name for path in reversed(finished(tmp_path / "killed" / "checkpoints"))]


def torchrun(out: Path, mode: str, log: Path) -> Process:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return Process([*arguments, "-m", "tests.train.torchrun_worker", str(out), mode], log, {})


def wait_for(what: Callable[[], bool], process: Process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, process.output[-3000:]
        time.sleep(0.02)


def logged(out: Path) -> int:
    """The last step in the log."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-2])["step"]) + 1 if len(lines) > 1 else 0


def gone(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"  # its parent is no more, and whoever is its parent now has not asked yet


@pytest.mark.slow
def test_workers_end_with_torchrun_and_with_each_other(tmp_path: Path) -> None:
    """torchrun killed: its workers end. Started again and asked to stop: they save. One fails: all do."""
    checkpoints = tmp_path / "checkpoints"
    process = torchrun(tmp_path, "run", tmp_path / "first.log")
    try:
        wait_for(lambda: logged(tmp_path) > 12, process)
        workers = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
        os.kill(process.popen.pid, signal.SIGKILL)
        wait_for(lambda: all(gone(worker) for worker in workers), process, 10)
    finally:
        process.kill()
    assert "the process that started this worker is gone" in process.output
    reached = int(finished(checkpoints)[0].name[5:])

    process = torchrun(tmp_path, "run", tmp_path / "second.log")
    try:
        wait_for(lambda: logged(tmp_path) > reached + 25, process)
        process.popen.send_signal(signal.SIGTERM)
        process.popen.wait(timeout=40)
    finally:
        process.kill()
    assert f"going on from step_{reached:07d}" in process.output
    stopped = int(finished(checkpoints)[0].name[5:])
    assert why_not(finished(checkpoints)[0]) is None
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, stopped + 1))

    failed = tmp_path / "failed"
    failed.mkdir()
    process = torchrun(failed, "fail", tmp_path / "third.log")
    try:
        assert process.popen.wait(timeout=90) == 1
        workers = [int((failed / f"pid-{rank}").read_text()) for rank in (0, 1)]
        assert all(gone(worker) for worker in workers)
    finally:
        process.kill()
    assert "the data is gone" in process.output
    assert finished(failed / "checkpoints")[0].name == "step_0000030"
