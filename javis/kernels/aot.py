"""``make aot``: compile every Triton kernel for the GPUs it is meant for, on a machine that has none.

Each op with Triton kernels lists their configurations in the full-size model (``aot_specs()`` in its triton_impl.py).
Each is compiled for sm_80, sm_90 and sm_100; registers and local memory are read from the cubin, shared memory from
Triton. The gates: a configuration that is a default does not spill on sm_90, and shared memory fits the chip.

Results are cached by what they depend on (source, configuration, versions), so that a second run takes seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from javis.errors import FailedError, UsageError
from javis.kernels.registry import NAMES
from javis.kernels.triton_support import HAS_TRITON, AotSpec, interpreting

ARCHS = (80, 90, 100)
GATED_ARCH = 90  # where a default configuration must not spill
# What one block may use of a multiprocessor's shared memory (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "javis" / "aot"


@dataclass(frozen=True, kw_only=True)
class AotConfig:
    """Compile the Triton kernels ahead of time and check registers, spills and shared memory."""

    op: str | None = None  # one op; None: all
    spec: str | None = None  # only configurations whose name contains this
    arch: tuple[int, ...] = ARCHS  # compute capabilities
    json: Path | None = None  # write the rows here as one JSON list
    cache: bool = True  # take results of unchanged kernels from the cache

    def __post_init__(self) -> None:
        if self.op is not None and self.op not in NAMES:
            raise UsageError(f"unknown op {self.op!r}: expected one of {', '.join(NAMES)}")
        if not self.arch or any(arch not in ARCHS for arch in self.arch):
            raise UsageError(f"unknown architecture in {self.arch}: expected some of {', '.join(map(str, ARCHS))}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One configuration compiled for one architecture. Sizes in bytes; local memory is per thread."""

    op: str
    spec: str
    arch: int
    default: bool
    num_warps: int
    num_stages: int
    registers: int = 0
    local: int = 0  # stack frame: where spilled registers live
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    error: str | None = None  # Triton or ptxas failed

    def red(self) -> str | None:
        """Which gate this breaks, or None."""
        if self.error is not None:
            return self.error
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"{self.shared} bytes of shared memory, limit {SHARED_LIMIT[self.arch]}"
        if self.default and self.arch == GATED_ARCH and self.local + self.spill_stores + self.spill_loads > 0:
            return f"spills: {self.local} bytes a thread, {self.spill_stores} stored, {self.spill_loads} loaded"
        return None


def collect(op: str | None = None) -> dict[str, list[AotSpec]]:
    """The configurations of all ops that have Triton kernels, by op."""
    found = {}
    for name in NAMES if op is None else (op,):
        module = f"javis.kernels.ops.{name}.triton_impl"
        if importlib.util.find_spec(module) is not None:
            found[name] = importlib.import_module(module).aot_specs()
            names = [spec.name for spec in found[name]]
            if len(set(names)) != len(names):
                raise FailedError(f"{name}: aot_specs() has two configurations of one name")
    return found


def compile_spec(op: str, spec: AotSpec, arch: int, *, cache: bool = True) -> Result:
    """Compile one configuration for one architecture; what goes wrong is in the result's ``error``."""
    path = CACHE / f"{_key(spec, arch)}.json"
    about: dict[str, Any] = {"op": op, "spec": spec.name, "default": spec.default}
    if cache and path.is_file():
        return Result(**json.loads(path.read_text(encoding="utf-8")) | about)
    about |= {"arch": arch, "num_warps": spec.num_warps, "num_stages": spec.num_stages}
    try:
        result = Result(**about, **_compile(spec, arch))
    except Exception as error:  # noqa: BLE001 - whatever Triton raises is the finding
        return Result(**about, error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    if cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
        temporary.replace(path)
    return result


def _jit_function(kernel: Any) -> Any:
    """The function under @triton.jit, below autotuners and heuristics."""
    from triton.runtime.jit import JITFunction

    while not isinstance(kernel, JITFunction):
        if not hasattr(kernel, "fn"):
            raise FailedError(f"{kernel!r} is not a Triton kernel; unset TRITON_INTERPRET, which replaces kernels")
        kernel = kernel.fn
    return kernel


def _key(spec: AotSpec, arch: int) -> str:
    import triton

    parts = dataclasses.asdict(dataclasses.replace(spec, kernel=None, name="", default=True))
    text = json.dumps([parts, arch, triton.__version__], default=str, sort_keys=True)
    return hashlib.sha256((_jit_function(spec.kernel).cache_key + text).encode()).hexdigest()[:32]


def _compile(spec: AotSpec, arch: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = _jit_function(spec.kernel)
    names = list(function.arg_names)
    constexpr = {name for name, kind in spec.signature.items() if kind == "constexpr"}
    if set(spec.signature) != set(names):
        raise FailedError(f"signature and kernel differ in {sorted(set(spec.signature) ^ set(names))}")
    if set(spec.constants) != constexpr:
        raise FailedError(f"constants and constexpr arguments differ in {sorted(set(spec.constants) ^ constexpr)}")
    source = ASTSource(
        fn=function,
        signature={name: spec.signature[name] for name in names},
        constexprs=spec.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    facts = _resources(compiled.asm["cubin"])
    if facts["local"] > 0:
        facts |= _spills(compiled.asm["ptx"])
    return facts | {"shared": int(compiled.metadata.shared)}


def _tool(*names: str) -> str:
    """The first of these programs of the CUDA toolkit that Triton brings along."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    raise FailedError(f"this build of triton {triton.__version__} has no {' or '.join(names)}")


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of the kernel in a cubin: what will really be loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_tool("cuobjdump"), "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", said)
    if found is None:
        raise FailedError(f"cuobjdump said {said[-300:]!r}")
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "local": max(stack, local)}


def _spills(ptx: str) -> dict[str, int]:
    """How many bytes are spilled, as ptxas says when it assembles the same PTX again."""
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    # Triton brings up to two; the one named after Blackwell is newer and reads what either of them can.
    program = _tool("ptxas-blackwell", "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [program, "-v", f"--gpu-name={target.group(1)}", str(path), "-o", f"{folder}/kernel.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if found is None:
        raise FailedError(f"ptxas said {done.stderr[-300:]!r}")
    stores, loads = map(int, found.groups())
    return {"spill_stores": stores, "spill_loads": loads}


def run(config: AotConfig, report: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Compile what ``config`` asks for, calling ``report`` for each result.

    Raises:
        UsageError: no Triton, or TRITON_INTERPRET=1, under which kernels cannot be compiled, or nothing matches.
    """
    if not HAS_TRITON:
        raise UsageError("triton is not installed (pip install 'javis[kernels]')")
    if interpreting():
        raise UsageError("TRITON_INTERPRET=1 is set, which replaces the kernels; unset it")
    results = []
    for op, specs in collect(config.op).items():
        for spec in specs:
            if (config.spec or "") in spec.name:
                for arch in (arch for arch in config.arch if arch >= spec.min_arch):
                    results.append(compile_spec(op, spec, arch, cache=config.cache))
                    report(results[-1])
    if not results:
        raise UsageError(f"no Triton kernel matches op={config.op!r}, spec={config.spec!r}")
    if config.json is not None:
        rows = [dataclasses.asdict(result) | {"red": result.red()} for result in results]
        config.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return results


def table(results: Sequence[Result]) -> Iterable[str]:
    """Lines: one per configuration; per architecture registers, bytes spilled per thread, KiB of shared memory."""
    archs = sorted({result.arch for result in results})
    width = max(len(result.spec) for result in results) + 2
    for op in dict.fromkeys(result.op for result in results):
        yield f"{op:{width + 12}}" + "".join(f"  {f'sm_{arch}: reg spill KiB':>22}" for arch in archs)
        mine = [result for result in results if result.op == op]
        for spec in dict.fromkeys(result.spec for result in mine):
            cells = ""
            for arch in archs:
                result = next((r for r in mine if (r.spec, r.arch) == (spec, arch)), None)
                if result is None:  # this chip lacks an instruction
                    cells += f"  {'-':>20}  "
                    continue
                text = f"{result.registers:3} {result.local:5} {result.shared / 1024:5.1f}"
                cells += f"  {'failed' if result.error else text:>20} {'!' if result.red() else ' '}"
            first = next(r for r in mine if r.spec == spec)
            launch = f"{first.num_warps}w {first.num_stages}s" + ("" if first.default else " alt")
            yield f"  {spec:{width}}{launch:10}" + cells
    for result in results:
        if result.red() is not None:
            yield f"RED  {result.op}, {result.spec}, sm_{result.arch}: {result.red()}"
    red = sum(result.red() is not None for result in results)
    yield f"{len(results)} compiled, {red} red" if red else f"{len(results)} compiled, all green"


def main() -> int:
    """The command; 0 green, 1 red, 2 cannot run."""
    import tyro
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        results = run(tyro.cli(AotConfig), lambda r: console.print(f"{r.op}, {r.spec}, sm_{r.arch}", style="dim"))
    except UsageError as error:
        Console(stderr=True, soft_wrap=True, markup=False).print(f"aot: {error}")
        return 2
    for line in table(results):
        console.print(line)
    return int(any(result.red() is not None for result in results))


if __name__ == "__main__":
    sys.exit(main())
