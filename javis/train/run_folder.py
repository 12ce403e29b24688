"""What a run writes beside its checkpoints: config.json and log.jsonl. One run at a time in a folder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from javis.errors import UsageError
from javis.train.processes import Processes

log = logging.getLogger("javis.train")

PATIENCE = 5.0  # seconds that workers of a killed run may still take to end


class RunFolder:
    """The folder of a run, locked by rank 0 as long as it is entered; the kernel frees the lock of a killed process.

    Raises:
        UsageError: another process trains there.
    """

    def __init__(self, folder: Path, resolved: Mapping[str, Any], processes: Processes) -> None:
        self.folder, self.first, self.processes = folder, processes.rank == 0, processes
        self.config_text = json.dumps(resolved, indent=1, default=str) + "\n"
        self._lock: Any = None
        self._rows: Any = None

    def __enter__(self) -> RunFolder:
        busy = False
        if self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
            end = time.monotonic() + PATIENCE
            while not (locked := _try_lock(self._lock)) and time.monotonic() < end:
                time.sleep(0.1)
            busy = not locked
        if self.processes.from_first(busy):
            self.__exit__()
            raise UsageError(f"another process trains in {self.folder}; wait for it, end it, or choose another --out")
        if self.first:
            path = self.folder / "config.json.tmp"
            path.write_text(self.config_text, encoding="utf-8")
            os.replace(path, self.folder / "config.json")
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._rows, self._lock):
            if file is not None:
                file.close()

    def begin_log(self, step: int) -> None:
        """Keep the rows up to ``step``: those after it will be made again. A row that was cut off goes as well."""
        if not self.first:
            return
        path = self.folder / "log.jsonl"
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
                if row["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._rows = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._rows.write(json.dumps({"step": step, **values}) + "\n")
        self._rows.flush()

    def flush(self) -> None:
        """The log onto the disk, as a checkpoint is about to be."""
        if self._rows is not None:
            os.fsync(self._rows.fileno())

    def say_resumed(self, checkpoint: Path, step: int, ranks: int) -> None:
        if self.first:
            log.info("going on from %s at step %d", checkpoint.name, step)
            if ranks != self.processes.world:
                log.info("it was written by %d processes, now there are %d", ranks, self.processes.world)


def _try_lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


__all__ = ["RunFolder"]
