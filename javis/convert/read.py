"""Foreign weights, read tensor by tensor and without running anything they contain.

``.safetensors`` files are mapped, and a tensor is read when it is asked for. ``.pth``, ``.pt``, ``.bin`` and ``.ckpt``
files are pickles: they go through ``torch.load(weights_only=True)``, which rebuilds tensors and plain containers and
refuses everything else before it runs. Weights may be one file or shards with a ``*.index.json``, and in a pickle they
may lie under ``state_dict``, ``model`` or ``ema``.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from javis.console import one_line
from javis.errors import UsageError

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
# Stems that libraries write; where a folder holds several files, one of these is the model.
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
# What wrappers (DistributedDataParallel, torch.compile, trainers) put in front of every name.
WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.", "ema.")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightSource(Protocol):
    """Named tensors that are read one at a time."""

    config: dict[str, Any] | None  # of the config.json beside them
    notes: list[str]  # what was noticed while opening
    folder: Path

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def get(self, name: str) -> Tensor: ...


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
            self.keys = list(self._file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(
                f"{path} is not a complete safetensors file ({one_line(str(error), 120)}); copy or download it again"
            ) from error

    def info(self, key: str) -> TensorInfo:
        part = self._file.get_slice(key)
        kind = part.get_dtype()
        if kind not in _DTYPES:
            raise UsageError(f"{key!r} has the dtype {kind}; expected one of {', '.join(_DTYPES)}")
        return TensorInfo(tuple(part.get_shape()), _DTYPES[kind])

    def get(self, key: str) -> Tensor:
        return self._file.get_tensor(key)


class _PickleFile:
    def __init__(self, path: Path, entry: str | None, notes: list[str]) -> None:
        self._tensors = _state_dict(_load_pickle(path), path, entry, notes)
        self.keys = list(self._tensors)

    def info(self, key: str) -> TensorInfo:
        tensor = self._tensors[key]
        return TensorInfo(tuple(tensor.shape), tensor.dtype)

    def get(self, key: str) -> Tensor:
        return self._tensors[key].detach()


def _load_pickle(path: Path) -> Any:
    """The content of a pickle of tensors; nothing in it is run."""
    try:
        mapped = zipfile.is_zipfile(path)  # the format since torch 1.6; older files cannot be mapped
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # if it matters, an error follows
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} is refused: it is not a pickle of tensors alone, and loading anything else could run code "
            f"({one_line(_refused(str(error)), 160)}); nothing of it was run. Use a .safetensors file, or save the "
            "state dict again where you trust it"
        ) from error
    # Broad on purpose: a damaged file fails anywhere in the unpickler or in the zip reader.
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise UsageError(
            f"{path} cannot be read as a torch checkpoint ({one_line(str(error), 120)}); copy or download it again"
        ) from error


def _refused(text: str) -> str:
    """The line of torch's long message that names what was refused."""
    found = re.search(r"WeightsUnpickler error: ([^\n]*)", text)
    return found.group(1) if found else text


def _state_dict(content: Any, path: Path, entry: str | None, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of a loaded pickle: at the top, or in the one part that has tensors (or the one named ``entry``)."""
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    parts = {
        str(name): part
        for name, part in content.items()
        if isinstance(part, Mapping) and any(isinstance(value, Tensor) for value in part.values())
    }
    if entry is not None:
        if entry not in parts:
            raise UsageError(f"{path} has no entry {entry!r} with tensors; it has {', '.join(parts) or 'none'}")
        content = parts[entry]
    elif not any(isinstance(value, Tensor) for value in content.values()):
        if len(parts) != 1:
            found = f"several: {', '.join(parts)}; choose one with --entry" if parts else "none"
            raise UsageError(f"{path} should hold one set of tensors, it holds {found}")
        entry, content = next(iter(parts.items()))
        notes.append(f"{path.name}: weights taken from the entry {entry!r}")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        notes.append(f"{path.name}: left out what is not a tensor: {', '.join(others[:8])}")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise UsageError(f"{path}: {name!r} is a sparse, quantized, complex or empty tensor; expected a dense one")
    return tensors


class Checkpoint:
    """The weights of one model in one or more files (a :class:`WeightSource`).

    Args:
        path: a weights file, or a folder with one file, or shards and their index; a training run's ``model/`` folder
            inside it is found.
        entry: which part of a pickle to take, if it has several.

    Raises:
        UsageError: nothing there, something missing or damaged, or a pickle that holds more than tensors.
    """

    def __init__(self, path: str | os.PathLike[str], entry: str | None = None) -> None:
        self.path = Path(path)
        self.notes: list[str] = []
        self.files, index = find_files(self.path, self.notes)
        self.folder = self.files[0].parent
        self._places: dict[str, tuple[_SafetensorsFile | _PickleFile, str]] = {}
        for file in self.files:
            opened = _SafetensorsFile(file) if file.suffix == ".safetensors" else _PickleFile(file, entry, self.notes)
            for key in opened.keys:
                if key in self._places:
                    raise UsageError(f"{key!r} is in more than one file of {self.folder}; expected every tensor once")
                self._places[key] = (opened, key)
        if index is not None:
            _check_index(index, self._places, self.folder)
        if not self._places:
            raise UsageError(f"{self.path} holds no tensors")
        self._unwrap()
        self.config = _read_config(self.folder, self.path, self.notes)

    def _unwrap(self) -> None:
        """Drop what a wrapper has put in front of every name."""
        found = True
        while found:
            found = False
            for wrapper in WRAPPERS:
                if all(name.startswith(wrapper) for name in self._places):
                    self._places = {name[len(wrapper) :]: place for name, place in self._places.items()}
                    self.notes.append(f"dropped {wrapper!r} in front of every name")
                    found = True

    def names(self) -> list[str]:
        return list(self._places)

    def info(self, name: str) -> TensorInfo:
        file, key = self._places[name]
        return file.info(key)

    def get(self, name: str) -> Tensor:
        file, key = self._places[name]
        return file.get(key)


# -- which files ------------------------------------------------------------------------------------------------------


def find_files(path: Path, notes: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of ``path``, and the map of their index (tensor -> file) if there is one."""
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _indexed(path)
        if path.suffix not in SUFFIXES:
            raise UsageError(f"{path} is not a weights file; expected one of {', '.join(SUFFIXES)}, or a folder")
        return [path], None
    if not path.is_dir():
        hint = (
            "; download it first (hf download NAME --local-dir FOLDER)"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
            else ""
        )
        raise UsageError(f"there is no {path}; expected a weights file or a folder with one{hint}")
    for suffixes in ((".safetensors",), PICKLES):  # the safe format first: many folders hold both
        if found := _in_folder(path, suffixes, notes):
            return found
    inner = path / "model"  # where the official training code saves
    if inner.is_dir():
        return find_files(inner, notes)
    there = sorted(p.name for p in path.iterdir())[:6]
    if parts := sorted(p.name for p in path.iterdir() if p.is_dir() and any(q.suffix in SUFFIXES for q in p.iterdir())):
        raise UsageError(f"{path} is a folder of several models ({', '.join(parts)}); convert one of these folders")
    raise UsageError(
        f"there are no weights in {path} (it holds {', '.join(there) or 'nothing'}); expected model.safetensors, "
        "diffusion_pytorch_model.safetensors, pytorch_model.bin, a .pth file, or shards with an index"
    )


def _in_folder(
    folder: Path, suffixes: tuple[str, ...], notes: list[str]
) -> tuple[list[Path], dict[str, str] | None] | None:
    indices = [p for suffix in suffixes for p in sorted(folder.glob(f"*{suffix}.index.json"))]
    if len(indices) > 1:
        raise UsageError(f"{folder} has several indices: {', '.join(p.name for p in indices)}; name one of them")
    if indices:
        return _indexed(indices[0])
    files = sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())
    shards = {p: match for p in files if (match := _SHARD.match(p.stem))}
    if shards:
        return _shards(folder, files, shards), None
    if len(files) > 1:
        usual = [p for stem in STEMS for p in files if p.stem == stem]
        if len(usual) != 1:
            raise UsageError(f"{folder} has several weights: {', '.join(p.name for p in files[:8])}; name one of them")
        others = ", ".join(p.name for p in files if p not in usual)
        notes.append(f"took {usual[0].name}, not {others}")
        files = usual
    return (files, None) if files else None


def _shards(folder: Path, files: list[Path], shards: Mapping[Path, re.Match[str]]) -> list[Path]:
    """Shards without an index: all of them, by the numbers in their names."""
    kinds = {(m["stem"], m["count"], p.suffix) for p, m in shards.items()}
    if len(kinds) > 1 or len(files) != len(shards):
        raise UsageError(
            f"{folder} has shards and other weights: {', '.join(p.name for p in files[:8])}; name an index"
        )
    stem, count, suffix = kinds.pop()
    names = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    _require_all(folder, names, "the names of the other shards")
    return [folder / name for name in names]


def _indexed(path: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file) for name, file in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is not an index of weights ({one_line(str(error), 80)}); expected json with a weight_map"
        ) from error
    names = sorted(set(pairs.values()))
    if strange := [name for name in names if Path(name).name != name or Path(name).suffix not in SUFFIXES]:
        raise UsageError(f"{path} names {strange[0]!r}; expected names of weights files in the same folder")
    _require_all(path.parent, names, path.name)
    if not names:
        raise UsageError(f"{path} names no weights")
    return [path.parent / name for name in names], pairs


def _require_all(folder: Path, names: list[str], source: str) -> None:
    if gone := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        raise UsageError(
            f"{folder} lacks {', '.join(gone[:3])}{more}, which {source} asks for; download the missing files"
        )


def _check_index(index: dict[str, str], places: Mapping[str, Any], folder: Path) -> None:
    if gone := sorted(set(index) - set(places)):
        raise UsageError(
            f"the index in {folder} names {len(gone)} tensors that are in no shard, such as {gone[0]!r} "
            f"(of {index[gone[0]]}); download the shards and the index again"
        )


def _read_config(folder: Path, path: Path, notes: list[str]) -> dict[str, Any] | None:
    """The config.json of the weights: beside them, or one level up from a training run's ``model/`` folder."""
    for place in dict.fromkeys((folder, path if path.is_dir() else folder)):
        file = place / "config.json"
        if file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UsageError(f"{file} is not json ({one_line(str(error), 80)}); repair or remove it") from error
            if not isinstance(config, dict):
                raise UsageError(f"{file} holds a {type(config).__name__}; expected a json object")
            return config
    notes.append("no config.json: the configuration comes from the shapes")
    return None
