"""Checkpoints of a training run, written by all of its processes and readable by any number of them.

A checkpoint is a folder, ``step_0000500``:

    checkpoint.json   the step, the number of processes, size and SHA-256 of every other file
    state.json        per process: random generators and place in the data; counters; settings of the optimizer
    config.json       the resolved configuration
    shard-*.safetensors   tensors ``model.*``, ``ema.*``, ``optimizer.*``: each process its shards

torch.distributed.checkpoint writes it, in its safetensors form: the metadata of the other form is a pickle, which this
project never reads. Everything goes into ``step_0000500.partial``, is flushed to the disk, and the folder is renamed
when all processes are done. So a folder without ``.partial`` was once complete; `why_not` says whether it still is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from javis.errors import FailedError, UsageError
from javis.train.processes import Processes

log = logging.getLogger("javis.train")

FORMAT = "javis-training/1"
MANIFEST = "checkpoint.json"
FILE_BYTES = 4 << 30  # of a process's file: it is put together in memory before it is written
_NAME = re.compile(r"step_(\d{7,})")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:07d}"


def finished(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, the newest first. Partial ones are none."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    made = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class _Writer(HuggingFaceStorageWriter):
    """Writes into a partial folder, and makes it the finished one when every process is done."""

    def __init__(self, folder: Path, files: dict[str, int], texts: dict[str, str], facts: dict[str, Any]) -> None:
        self.folder, self.partial = folder, folder.with_name(folder.name + ".partial")
        super().__init__(str(self.partial), fqn_to_index_mapping=files, save_distributed=True)
        self.texts, self.facts = texts, facts

    def write_data(self, plan: Any, planner: Any) -> Any:
        done = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in done.value()}:  # this process's files
            path = self.partial / name
            _write(path.with_suffix(".json"), json.dumps({"bytes": path.stat().st_size, "sha256": digest(path)}))
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        """Called by one process, after every process has written, unless one of them failed."""
        files = {}
        for path in sorted(self.partial.glob("*.safetensors")):
            said = path.with_suffix(".json")
            files[path.name] = json.loads(said.read_text(encoding="utf-8"))
            said.unlink()
        for name, text in self.texts.items():
            path = self.partial / name
            _write(path, text)
            files[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
        _write(self.partial / MANIFEST, json.dumps({"format": FORMAT, **self.facts, "files": files}, indent=1) + "\n")
        _flush_folder(self.partial)
        os.rename(self.partial, self.folder)
        _flush_folder(self.folder.parent)


def _quiet() -> None:
    """Without torch.distributed it warns, in threads too, that it takes this process for the only one: it is."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _files_of(tensors: dict[str, Tensor], world: int) -> dict[str, int]:
    """Which of a process's files a tensor goes into: model, average and optimizer apart, `FILE_BYTES` each at most."""
    numbers, file, size, kind = {}, 0, 0, ""
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size() // world
        if kind != name.partition(".")[0] or size + bytes_ > FILE_BYTES:
            kind, file, size = name.partition(".")[0], file + 1, 0
        numbers[name], size = file, size + bytes_
    return numbers


class Checkpoints:
    """The checkpoints of a run. Every process calls the same methods in the same order.

    Args:
        folder: where they are.
        keep: so many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = folder, keep, processes
        self._pending: tuple[Future[Any], Path] | None = None
        self.failed: str | None = None  # what the last attempt to save died of
        if processes.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():  # of a run that was killed
                if path.suffix in (".partial", ".removing"):
                    shutil.rmtree(path, ignore_errors=True)
        processes.from_first(None)  # no process writes before this is done

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(self, step: int, tensors: dict[str, Tensor], texts: dict[str, str], facts: dict[str, Any]) -> None:
        """Begin a checkpoint; training may go on at once. The one before must be done (`poll`).

        Args:
            tensors: ``model.*``, ``ema.*``, ``optimizer.*``; the same names on every process.
            texts: further files, by name; those of rank 0 are written. facts: of ``checkpoint.json``.
        """
        assert self._pending is None
        target = step_folder(self.folder, step)
        if target.exists():  # a run that fell back to an older checkpoint writes over the one that it could not read
            if self.processes.rank == 0:
                self._remove(target)
            self.processes.from_first(None)
        writer = _Writer(target, _files_of(tensors, self.processes.world), texts, {"step": step, **facts})
        group = self.processes.writing
        _quiet()
        future = dcp.async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        assert isinstance(future, Future)
        self._pending = future, target

    def poll(self, *, wait: bool) -> Path | None:
        """The checkpoint that was begun, once it is finished; None if there is none, or it failed (`failed` says why).

        Args:
            wait: for it. Otherwise, where any process is not done, nothing is said yet.
        """
        if self._pending is None:
            return None
        future, target = self._pending
        if not wait and not all(self.processes.gathered(future.done())):
            return None
        self._pending = None
        try:
            future.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            self.failed = _cause(error)
            log.error("checkpoint %s could not be written: %s; the one before is kept", target.name, self.failed)
            if self.processes.rank == 0:
                shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
            self.processes.from_first(None)
            return None
        self.failed = None
        if self.processes.rank == 0:
            for old in finished(self.folder)[self.keep :]:
                self._remove(old)
        return target

    def _remove(self, folder: Path) -> None:
        gone = folder.with_name(folder.name + ".removing")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)  # so that a kill in between leaves nothing that looks like a checkpoint
        shutil.rmtree(gone, ignore_errors=True)

    # -- reading ------------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest checkpoint that can be read; says which ones cannot, and why.

        Raises:
            FailedError: there are some, but none can be read.
        """
        names = self.processes.from_first([path.name for path in finished(self.folder)])
        for name in names:
            reasons = self.processes.gathered(why_not(self.folder / name, self.processes.rank, self.processes.world))
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is None:
                return self.folder / name
            log.warning("checkpoint %s is not usable: %s; looking for the one before", name, reason)
        if names:
            raise FailedError(
                f"none of the {len(names)} checkpoints in {self.folder} can be read; remove them to begin anew"
            )
        return None

    def load(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Read these tensors in place, whatever number of processes wrote them."""
        group, reader = self.processes.writing, HuggingFaceStorageReader(str(folder))
        _quiet()
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


def _cause(error: BaseException) -> str:
    """The first line of what went wrong on the first process for which something did."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = sorted(error.failures.items())[0]
        return f"{type(cause).__name__} on rank {rank}: {' '.join(str(cause).split())[:300]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def why_not(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Why a checkpoint cannot be read, or None. Hashes are checked of every ``parts``-th file from ``part`` on."""
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            return f"{MANIFEST} says format {told['format']!r}, expected {FORMAT!r}"
        for i, (name, facts) in enumerate(sorted(told["files"].items())):
            path = folder / name
            if path.parent != folder or not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != facts["bytes"]:
                return f"{name} has {size} bytes instead of {facts['bytes']}"
            if i % parts == part and digest(path) != facts["sha256"]:
                return f"{name} has changed since it was written"
        if strangers := {path.name for path in folder.glob("*.safetensors")} - set(told["files"]):
            return f"{min(strangers)} is not one of its files"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    return None


def entries(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, whole shapes and dtypes of the tensors of a checkpoint."""
    told = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in told.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_weights(folder: Path, *, average: bool = True) -> dict[str, Tensor]:
    """Whole weights of a checkpoint, or of the newest one of a run, under the names of the trained module.

    Args:
        folder: a checkpoint, the folder of checkpoints, or a run's folder (with ``checkpoints`` in it).
        average: the averaged weights, where there are any; parameters that were not trained come as they are.

    Raises:
        UsageError: no checkpoint there. FailedError: it is damaged.
    """
    below = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if not (below / MANIFEST).is_file():
        usable = next((path for path in finished(below) if why_not(path) is None), None)
        if usable is None:
            raise UsageError(f"{folder} holds no usable checkpoint of a training run (step_..., {MANIFEST})")
        below = usable
    elif (reason := why_not(below)) is not None:
        raise FailedError(f"checkpoint {below} is not usable: {reason}; take an older one")
    there = entries(below)
    names = {name.partition(".")[2]: name for name in there if name.startswith("model.")}
    if average:
        names |= {name.partition(".")[2]: name for name in there if name.startswith("ema.")}
    tensors = {name: torch.empty(there[name][0], dtype=there[name][1]) for name in names.values()}
    _quiet()
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(below)), no_dist=True)
    return {short: tensors[name] for short, name in names.items()}


__all__ = ["Checkpoints", "digest", "entries", "finished", "read_weights", "step_folder", "why_not"]
