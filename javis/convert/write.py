"""Component folders: sharded safetensors and json, complete or not there at all.

A component is written into a hidden folder beside its place and renamed into it when everything is on disk, so that a
run that is killed, or finds the disk full, leaves no half component.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import javis
from javis.component_files import put_in_place
from javis.console import one_line
from javis.convert.plan import Component, Plan
from javis.convert.read import WeightSource
from javis.convert.report import Report
from javis.errors import FailedError, UsageError

INDEX = "model_index.json"
PARTIAL = ".partial"


def _file_mode() -> int:
    """What new files get here; asking for the umask means setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask


_FILE_MODE = _file_mode()


@dataclass
class Writer:
    """Writes the components of one plan below ``folder``."""

    folder: Path
    dtype: torch.dtype | None  # of floating point tensors; None keeps what the source has
    max_shard_bytes: int
    progress: Callable[[float], None] | None = None  # called with the share of the tensors that is written, 0..1
    _done: int = field(default=0, init=False)

    def component(self, component: Component, source: WeightSource, report: Report, place: Path) -> None:
        """Write one component into the folder ``place``; values that cannot be kept are added to ``report.broken``."""
        for name, origin in component.files.items():
            shutil.copyfile(origin, place / name)
        if component.finish is not None:
            component.finish(place)
        if component.config:
            _write_json(place / "config.json", self._config(component))
        rows = [row for row in report.used if row["component"] == component.name]
        shards = _split(rows, self.max_shard_bytes) if rows else []
        names = shard_names(component.stem, len(shards))
        for file, shard in zip(names, shards, strict=True):
            tensors: dict[str, Tensor] = {}
            taken: set[int] = set()
            for row in shard:
                tensor = self._read(source, row, report)
                if tensor.untyped_storage().data_ptr() in taken:  # safetensors stores no memory under two names
                    tensor = tensor.clone()
                taken.add(tensor.untyped_storage().data_ptr())
                tensors[row["target"]] = tensor
                self._done += 1
                if self.progress is not None:
                    self.progress(self._done / len(report.used))
            save_file(tensors, place / file, metadata={"format": "pt"})
            os.chmod(place / file, _FILE_MODE)  # the library makes files that nobody else may read
            _sync(place / file)
        if len(shards) > 1:
            total = sum(_bytes(row) for row in rows)
            where = {row["target"]: file for file, shard in zip(names, shards, strict=True) for row in shard}
            _write_json(
                place / f"{component.stem}.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
            )

    def _config(self, component: Component) -> dict[str, Any]:
        """config.json; what a library's says of the dtype becomes what is written."""
        told = {name: str(self.dtype).removeprefix("torch.") for name in ("dtype", "torch_dtype")}
        return {n: told[n] if self.dtype and n in told else value for n, value in component.config.items()}

    def _read(self, source: WeightSource, row: dict[str, Any], report: Report) -> Tensor:
        tensor = source.get(row["source"]).reshape(row["shape"])
        if tensor.dtype.is_floating_point:
            fine = bool(torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all())
            if not fine:
                report.broken.append({"source": row["source"], "reason": "has values that are NaN or infinite"})
            if self.dtype is not None:
                narrow = tensor.to(self.dtype)
                if fine and not bool(torch.isfinite(narrow).all()):
                    report.broken.append(
                        {"source": row["source"], "reason": f"has values too large for {row['dtype']}; take bfloat16"}
                    )
                tensor = narrow
        return tensor.contiguous()


def shard_names(stem: str, count: int) -> list[str]:
    """File names of the shards, as diffusers and transformers call them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _bytes(row: dict[str, Any]) -> int:
    return torch.Size(row["shape"]).numel() * getattr(torch, row["dtype"]).itemsize


def _split(rows: list[dict[str, Any]], limit: int) -> list[list[dict[str, Any]]]:
    """Rows in order, in groups of at most ``limit`` bytes (a larger tensor stands alone)."""
    shards: list[list[dict[str, Any]]] = [[]]
    size = 0
    for row in rows:
        if shards[-1] and size + _bytes(row) > limit:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += _bytes(row)
    return shards


# -- the folder -------------------------------------------------------------------------------------------------------


def check_destination(folder: Path, plan: Plan, report: Report, overwrite: bool, keep: set[Path]) -> None:
    """Refuse what would lose data or cannot be written, before anything is.

    Args:
        keep: files that are read and must not be replaced.

    Raises:
        UsageError: a component is there already, or the place is not a folder.
        FailedError: too little space.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; expected a folder for the checkpoint")
    for component in plan.components:
        place = folder / component.name
        if any(place.resolve() in file.resolve().parents for file in keep):
            raise UsageError(
                f"{place} is being read, and would be replaced by its conversion; give another destination"
            )
        if place.exists() and not overwrite:
            raise UsageError(f"{place} is there already; --overwrite replaces it, or give another destination")
    read_index(folder)
    needed = sum(_bytes(row) for row in report.used)
    parent = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    disk = shutil.disk_usage(parent)
    free = disk.free
    if disk.total and free < needed:  # what is no disk has a size of 0; making a folder there says why it fails
        raise FailedError(
            f"{folder} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room and try again"
        )


@contextlib.contextmanager
def staged(folder: Path, names: list[str]) -> Iterator[dict[str, Path]]:
    """New folders to write to; at the end of the block they take the places ``folder/name``, on an error they vanish.

    Raises:
        FailedError: the disk is full or fails. UsageError: no permission.
    """
    made = not folder.exists()
    places = {name: folder / f".{name}-{secrets.token_hex(4)}{PARTIAL}" for name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in places.values():
            place.mkdir()
        yield places
        put_in_place({place: folder / name for name, place in places.items()})
    except BaseException as error:
        for place in places.values():
            shutil.rmtree(place, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # not empty, or never made
                folder.rmdir()
        if isinstance(error, (PermissionError, NotADirectoryError, FileNotFoundError)):
            raise UsageError(f"cannot write to {folder} ({one_line(str(error), 120)}); give another folder") from error
        if isinstance(error, (OSError, SafetensorError)):
            raise FailedError(
                f"writing {folder} failed ({one_line(str(error), 120)}); nothing half-written was left; make room and "
                "try again"
            ) from error
        raise


def leftovers(folder: Path) -> list[str]:
    """What a run that was killed outright (SIGKILL, power) may have left; nobody reads it."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(".") and p.suffix in (PARTIAL, ".old"))


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a checkpoint folder; a new one if there is none.

    Raises:
        UsageError: it is there and not usable.
    """
    path = folder / INDEX
    if not path.is_file():
        return {"_class_name": "JavisPipeline", "javis": javis.__version__, "components": {}, "random_weights": False}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        dict(index["components"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not usable ({one_line(str(error), 80)}); remove it or convert elsewhere"
        ) from error
    return index


def write_index(folder: Path, components: dict[str, str], clip: dict[str, Any]) -> None:
    """Add components (name -> class) to model_index.json, and defaults of the clip where it has none."""
    index = read_index(folder)
    index["components"] = dict(index["components"]) | components
    if clip:
        index["clip"] = clip | dict(index.get("clip", {}))
    fresh = folder / f".{INDEX}-{secrets.token_hex(4)}{PARTIAL}"
    try:
        _write_json(fresh, index)
        os.replace(fresh, folder / INDEX)
    finally:
        fresh.unlink(missing_ok=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until the file is on the disk: only then may the folder be renamed into its place."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
