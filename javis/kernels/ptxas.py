"""``make native-cuda``: what ptxas said of each CUDA kernel, as a table, with a gate.

``setup.py`` compiles csrc/cuda with ``-Xptxas -v`` and keeps what nvcc printed beside each object. The gate: on sm_90a
no kernel has a stack frame or spills registers. Needs nvcc for the build, but no GPU.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from javis.errors import UsageError

GATED_ARCH = "sm_90a"


@dataclass(frozen=True, kw_only=True)
class PtxasConfig:
    """Print registers, stack, spills and shared memory per CUDA kernel and check them."""

    folder: Path = Path("build")  # logs are looked for here and below
    json: Path | None = None  # write the rows here as one JSON list


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel on one architecture. Bytes; stack and spills are per thread, shared memory per block, static part."""

    source: str
    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    def red(self) -> str | None:
        """Which gate this breaks, or None."""
        if self.arch == GATED_ARCH and self.stack + self.spill_stores + self.spill_loads > 0:
            return f"{self.stack} bytes of stack, {self.spill_stores} stored and {self.spill_loads} loaded by spills"
        return None


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(source: str, log: str) -> list[Kernel]:
    """The kernels in one log of nvcc.

    Functions that a kernel calls and that were not inlined count as the kernel's own: the largest stack and spills of
    what stands between one entry and the next.

    Raises:
        ValueError: an entry without the facts that must follow it.
    """
    kernels = []
    for part in log.split("ptxas info    : ")[1:]:
        entry = _ENTRY.search(part)
        if entry is not None:
            kernels.append({"name": entry[1], "arch": entry[2], "stack": -1, "registers": -1, "shared": 0})
            kernels[-1] |= {"spill_stores": 0, "spill_loads": 0}
        if not kernels:
            continue
        now = kernels[-1]
        for stack, stores, loads in _STACK.findall(part):
            for key, value in (("stack", stack), ("spill_stores", stores), ("spill_loads", loads)):
                now[key] = max(int(now[key]), int(value))
        used = _USED.search(part)
        if used is not None:
            now["registers"] = int(used[1])
            shared = _SHARED.search(part)
            now["shared"] = int(shared[1]) if shared is not None else 0
    for kernel in kernels:
        if int(kernel["stack"]) < 0 or int(kernel["registers"]) < 0:
            raise ValueError(f"{source}: ptxas said nothing of {kernel['name']} for {kernel['arch']}")
    return [Kernel(source=source, **kernel) for kernel in kernels]  # type: ignore[arg-type]


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """Names as in the source, without namespaces, arguments and what they return; as they are without c++filt."""
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if program is None or not names:
        return {name: name for name in names}
    done = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True, timeout=60)
    short = []
    for text in done.stdout.splitlines():
        text = re.sub(r"javis::cuda::|\(anonymous namespace\)::", "", text)
        short.append(re.sub(r"\([^<>]*\)$", "", text).removeprefix("void "))
    return dict(zip(names, short, strict=True))


def collect(folder: Path) -> list[Kernel]:
    """The kernels in all logs below the folder, sorted.

    Raises:
        UsageError: there are none, so that a build without CUDA does not pass for a clean one.
    """
    kernels = []
    for path in sorted(folder.rglob("*.cu.o.log")):
        kernels += parse(path.name.removesuffix(".o.log").removeprefix("csrc_cuda_"), path.read_text(encoding="utf-8"))
    if not kernels:
        raise UsageError(
            f"no CUDA build below {folder}: run JAVIS_CUDA_ARCHS='80;90a' python setup.py build_ext --inplace"
        )
    names = _demangled([kernel.name for kernel in kernels])
    kernels = [dataclasses.replace(kernel, name=names[kernel.name]) for kernel in kernels]
    return sorted(kernels, key=lambda kernel: (kernel.source, kernel.name, kernel.arch))


def table(kernels: Sequence[Kernel]) -> Iterable[str]:
    """Lines: one per kernel; per architecture registers, stack, bytes stored by spills, bytes of shared memory."""
    archs = sorted({kernel.arch for kernel in kernels})
    width = max(len(kernel.name) for kernel in kernels) + 2
    by_place = {(kernel.source, kernel.name, kernel.arch): kernel for kernel in kernels}
    for source in dict.fromkeys(kernel.source for kernel in kernels):
        yield f"{source:{width + 2}}" + "".join(f"{f'{arch}: reg stack spill  smem':>34}" for arch in archs)
        for name in dict.fromkeys(kernel.name for kernel in kernels if kernel.source == source):
            cells = ""
            for arch in archs:
                kernel = by_place.get((source, name, arch))
                text = "-"
                if kernel is not None:
                    text = f"{kernel.registers:3} {kernel.stack:5} {kernel.spill_stores:5} {kernel.shared:5}"
                    text += "!" if kernel.red() else ""
                cells += f"{text:>34}"
            yield f"  {name:{width}}" + cells
    red = [kernel for kernel in kernels if kernel.red() is not None]
    for kernel in red:
        yield f"RED  {kernel.source}, {kernel.name}, {kernel.arch}: {kernel.red()}"
    gated = sum(kernel.arch == GATED_ARCH for kernel in kernels)
    if gated == 0:
        yield f"RED  nothing was compiled for {GATED_ARCH}, where the gate is"
    verdict = f"{len(red)} red" if red else "no stack, no spills"
    yield f"{len(kernels)} compiled, {gated} of them for {GATED_ARCH}: {verdict}"


def main() -> int:
    """The command; 0 green, 1 red, 2 cannot run."""
    import tyro
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    config = tyro.cli(PtxasConfig)
    try:
        kernels = collect(config.folder)
    except UsageError as error:
        Console(stderr=True, soft_wrap=True, markup=False).print(f"native-cuda: {error}")
        return 2
    for line in table(kernels):
        console.print(line)
    if config.json is not None:
        rows = [dataclasses.asdict(kernel) | {"red": kernel.red()} for kernel in kernels]
        config.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(kernel.red() is not None for kernel in kernels) or all(k.arch != GATED_ARCH for k in kernels))


if __name__ == "__main__":
    sys.exit(main())
