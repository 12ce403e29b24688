"""The CUDA kernels of csrc/cuda on a CPU: their sources compiled by g++ against the emulator, called through ctypes.

What the emulator checks is written in csrc/cuda/emulator.h. With ``JAVIS_EMULATE_SANITIZE=1`` the kernels are compiled
with the address and undefined-behaviour sanitizers, which also see every plain access; Python must then run with the
sanitizer's library preloaded (tests/kernels/test_cuda_emulator.py does so in a process of its own).
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc/cuda"
FLAGS = ["-DJAVIS_EMULATE", "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
NVCC = shutil.which("nvcc")
needs_emulator = pytest.mark.skipif(
    shutil.which("g++") is None or not CUDA.is_dir(), reason="needs g++ and the source tree to emulate CUDA kernels"
)


class Emulated:
    """The entry points (JAVIS_ENTRY) of one .cu file."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.keep: list[torch.Tensor] = []

    def order(self, seed: int) -> None:
        """In which order the threads of a block run: 0 as numbered, else shuffled; odd: warp by warp to a barrier."""
        self.library.javis_emulator_order(ctypes.c_uint(seed))

    def _word(self, value: Any) -> int:
        if value is None:
            return 0
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            buffer = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
            self.library.javis_emulator_buffer(*buffer)
            return value.data_ptr()
        if isinstance(value, float):
            return int.from_bytes(struct.pack("<d", value), "little")
        return int(value) & 0xFFFFFFFFFFFFFFFF

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        try:
            problem = function(*arguments, ctypes.c_void_p(None))
        finally:
            self.library.javis_emulator_forget_buffers()
        if problem is not None:
            raise RuntimeError(f"{name}: {problem.decode()}")

    def __call__(self, name: str, *fields: Any) -> None:
        """Call ``const char* name(const Arguments*, void* stream)``; raises RuntimeError with what it returns.

        ``fields`` are those of the struct, in order: tensors and None for pointers, int for int64_t, float for double.
        The struct has no other types, so that every field is one word. Accesses of 4 bytes and more by load16 and the
        like are held to the storages of these tensors.
        """
        words = [self._word(field) for field in fields]
        self._call(name, (ctypes.c_uint64 * len(words))(*words))

    def plain(self, name: str, *arguments: Any) -> None:
        """The same for a function whose arguments are pointers and int themselves."""
        converted = [
            ctypes.c_int(value) if isinstance(value, int) else ctypes.c_void_p(self._word(value)) for value in arguments
        ]
        self._call(name, *converted)


class OnGpu(Emulated):
    """The same entry points as nvcc compiles them. Tensors are copied to the GPU and back."""

    def __init__(self, source: Path, folder: Path) -> None:
        library = folder / f"{source.stem}.so"
        _run(
            [str(NVCC), "-shared", "-Xcompiler", "-fPIC", "-std=c++20", "-arch=native", str(source), "-o", str(library)]
        )
        super().__init__(ctypes.CDLL(str(library)))

    def order(self, seed: int) -> None:
        """The hardware has its own order."""

    def plain(self, name: str, *arguments: Any) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        copies = [value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments]
        words = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else ctypes.c_int(value)
            for value in copies
        ]
        torch.cuda.synchronize()
        problem = function(*words, ctypes.c_void_p(None))
        torch.cuda.synchronize()
        if problem is not None:
            raise RuntimeError(f"{name}: {problem.decode()}")
        for value, copy in zip(arguments, copies):
            if isinstance(value, torch.Tensor):
                value.copy_(copy)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _make(target: Path, command: list[str]) -> Path:
    """Run the command with ``target`` as its output, unless an earlier run made it."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at once
            if not target.exists():
                unfinished = target.with_name(f"unfinished-{target.name}")
                _run([*command, "-o", str(unfinished)])
                unfinished.replace(target)
    return target


def _flags() -> list[str]:
    return FLAGS + (SANITIZERS if os.environ.get("JAVIS_EMULATE_SANITIZE") == "1" else [])


def _compile(source: Path, flags: list[str]) -> Path:
    """The object file of one source; made again when it or a header changes that it could include."""
    digest = hashlib.sha256(" ".join(flags).encode() + source.read_bytes())
    patterns = ("*.h", "*.cuh") if source.suffix == ".cu" else ("*.h",)
    for header in sorted(path for pattern in patterns for path in (ROOT / "csrc").rglob(pattern)):
        digest.update(header.read_bytes())
    target = ROOT / "build/emulated" / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    return _make(target, ["g++", "-x", "c++", "-c", *flags, str(source)])


def _link(name: str, objects: list[Path], flags: list[str]) -> Path:
    digest = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
    target = ROOT / "build/emulated" / f"{name}-{digest}.so"
    return _make(target, ["g++", "-shared", *(f for f in _flags() if "sanitize" in f), *map(str, objects), *flags])


@functools.cache
def emulate(source: Path) -> Emulated:
    """Compile one .cu file for the emulator, or take the result of an earlier run, and load it."""
    return Emulated(ctypes.CDLL(str(_link(source.stem, [_compile(source, _flags())], []))))


@functools.cache
def emulated_ops() -> Any:
    """``torch.ops.javis_emulated``: the CUDA ops with their bindings, on CPU tensors, run by the emulator."""
    torch_folder = Path(torch.__file__).parent
    # The bindings are never sanitized: they take long to compile, and touch no memory of tensors themselves.
    binding = [*FLAGS, "-isystem", str(torch_folder / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    objects = [_compile(source, _flags()) for source in sorted(CUDA.glob("*.cu"))]
    objects += [_compile(source, binding) for source in sorted(CUDA.glob("*.cpp"))]
    library = _link("ops", objects, [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"])
    torch.ops.load_library(str(library))
    return torch.ops.javis_emulated
