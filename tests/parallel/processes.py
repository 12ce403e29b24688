"""Start processes that belong together, and leave none behind, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A child in a session of its own, its output in a file (a full pipe would block it)."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path = ROOT) -> None:
        self.log, self._file = log, log.open("wb")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.popen = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | environment,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def kill(self) -> None:
        """End it and all of its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(timeout=30)
        self._file.close()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


def wait_all(processes: Sequence[Process], timeout: float, *, stop_at_failure: bool = True) -> list[int]:
    """Exit codes. Kills all of them after ``timeout`` seconds, or (if asked to) as soon as one of them fails."""
    end = time.monotonic() + timeout
    try:
        while True:
            codes = [process.popen.poll() for process in processes]
            done = [code for code in codes if code is not None]
            if len(done) == len(codes):
                return done
            if stop_at_failure and any(done):
                time.sleep(0.5)  # the others may be about to say more
                return [-1 if code is None else code for code in codes]
            if time.monotonic() > end:
                said = "\n".join(process.output[-2000:] for process in processes)
                raise AssertionError(f"processes ran for more than {timeout} s; exit codes {codes}\n{said}")
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()


def run_ranks(module: str, arguments: Sequence[str], world: int, folder: Path, timeout: float) -> None:
    """``python -m module ARGUMENTS`` as ``world`` ranks; fails with their output if any of them does."""
    processes = [
        Process(
            ["-m", module, *arguments],
            folder / f"rank{rank}.log",
            {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    codes = wait_all(processes, timeout)
    assert codes == [0] * world, "\n".join(f"[{p.log.name}]\n{p.output[-3000:]}" for p in processes)
