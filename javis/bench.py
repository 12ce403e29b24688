"""Microbenchmarks of the ops: ``javis bench kernels``, or ``python -m javis.bench`` with the same options.

For each case: first the correctness gate (every backend against float64, forward and gradients), then warm-up, then
timing with the variants interleaved launch by launch, so that a machine that slows down slows all of them down. Input
buffers are rotated, so that a call does not find its input in the cache from the call before. A red gate prints no
time. Baselines carry no gate: ``eager`` is the model's own default op (the best path of plain PyTorch), and ``compiled
eager`` is that under torch.compile, whose float32 sums over tokens would leave the budget.

The copy of ``x`` is timed among the variants: it moves the bytes that the forward pass must move, and its speed is the
peak that shares are stated of. Rows are appended to ``benchmarks/results/<device>.jsonl``; a figure without its row
does not exist.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from rich.console import Console
from rich.table import Table
from torch import Tensor

import javis
from javis.doctor import cpu_name
from javis.errors import UsageError
from javis.kernels import native
from javis.kernels.backend import Backend, why_not
from javis.kernels.cases import OpCase
from javis.kernels.registry import OPS, Op
from javis.kernels.testing import assert_within_budget
from javis.model.ops import ModelOps

RESULTS = Path("benchmarks/results")
_ROTATED_BYTES = 64 << 20  # more than the last-level cache share of a core
_COPY = "copy"
_EAGER, _COMPILED = "eager", "compiled eager"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure and where the rows go."""

    op: str | None = None  # one op; None: all
    case: str | None = None  # only cases whose name contains this
    backend: str | None = None  # one backend beside eager and copy; None: all that run here
    seconds: float = 1.0  # time spent on each case and mode
    threads: int | None = None  # CPU threads; None: as torch is set up
    compiled: bool = False  # also time the eager baseline under torch.compile
    json: Path | None = None  # write the rows of this run here as one JSON list
    append: bool = True  # append the rows to benchmarks/results/<device>.jsonl when that folder exists

    def __post_init__(self) -> None:
        if self.op is not None and self.op not in OPS:
            raise UsageError(f"unknown op {self.op!r}: expected one of {', '.join(OPS)}")
        if not 0 < self.seconds <= 600:
            raise UsageError(f"seconds is {self.seconds}: expected more than 0 and at most 600")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}: expected 1 or more")
        if self.backend is not None:
            Backend.parse(self.backend)


Row = dict[str, Any]
Call = Callable[..., Tensor]


def run(config: BenchConfig, report: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Measure and return the rows, calling ``report`` for each as it is finished.

    Raises:
        UsageError: nothing matches the filters, or the backend cannot run a case.
        AssertionError: a variant is outside its error budget; nothing is timed or written for that case.
    """
    before = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        # Backward passes are timed on retained graphs, which compiled ones allow only without donated buffers.
        with torch._functorch.config.patch(donated_buffer=False):
            rows = _run(config, report)
    finally:
        torch.set_num_threads(before)
    if not rows:
        raise UsageError(f"no case matches op={config.op!r}, case={config.case!r}")
    if config.json is not None:
        config.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if config.append:
        append_rows(rows)
    return rows


def append_rows(rows: Sequence[Row]) -> Path | None:
    """Add rows (of one device) to ``benchmarks/results/<device>.jsonl`` of this checkout; None outside a checkout."""
    if not RESULTS.is_dir():
        return None
    path = RESULTS / f"{_slug(rows[0]['device'])}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _run(config: BenchConfig, report: Callable[[Row], None]) -> list[Row]:
    where = environment()
    rows = []
    for name, op in OPS.items():
        for case in op.cases():
            if config.op not in (None, name) or (config.case or "") not in case.name:
                continue
            variants = _variants(name, op, case, config)
            check(name, case, variants)
            for backward in (False, True):
                for row in _measure(case, variants, backward=backward, seconds=config.seconds):
                    dtype = str(case.dtype).removeprefix("torch.")
                    rows.append({"op": name, "case": case.name, "dtype": dtype, **row, **where})
                    report(rows[-1])
    return rows


def _variants(name: str, op: Op, case: OpCase, config: BenchConfig) -> dict[str, Call]:
    """Callables under the names their rows carry: backends first, then baselines."""
    args, kwargs = case.inputs()
    backends = {backend: why_not(op.checks, backend, *args, *kwargs.values()) for backend in op.checks}
    if config.backend is not None:
        reason = why_not(op.checks, Backend.parse(config.backend), *args, *kwargs.values())
        if reason is not None:
            raise UsageError(f"{name}: backend {config.backend!r} cannot run {case.name}: {reason}")
        backends = {Backend.parse(config.backend): None}

    variants: dict[str, Call] = {
        backend.value: partial(op.function, backend=backend) for backend, reason in backends.items() if reason is None
    }
    variants[_EAGER] = getattr(ModelOps(), name)
    if config.compiled:
        torch.compiler.reset()  # each case compiles afresh, for its own shape
        variants[_COMPILED] = torch.compile(variants[_EAGER], fullgraph=True)
    return variants


def _with_grad(
    case: OpCase, seed: int, dtype: torch.dtype | None = None
) -> tuple[list[Any], dict[str, Any], list[Tensor]]:
    """Inputs of a case with gradients switched on, and the list of those that have one."""
    args, kwargs = case.inputs(seed=seed)

    def ready(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype or value.dtype).requires_grad_()
        return value

    ready_args, ready_kwargs = [ready(a) for a in args], {k: ready(v) for k, v in kwargs.items()}
    leaves = [v for v in [*ready_args, *ready_kwargs.values()] if isinstance(v, Tensor) and v.requires_grad]
    return ready_args, ready_kwargs, leaves


def check(name: str, case: OpCase, variants: dict[str, Call]) -> None:
    """The correctness gate: every backend within its budget on this case, forward and all gradients."""

    def outputs(function: Call, dtype: torch.dtype | None = None) -> list[Tensor]:
        args, kwargs, leaves = _with_grad(case, 0, dtype)
        y = function(*args, **kwargs)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    reference = partial(OPS[name].function, backend=Backend.REFERENCE)
    exact, same = outputs(reference, torch.float64), outputs(reference)
    for variant, function in variants.items():
        if variant in (_EAGER, _COMPILED):
            continue
        for index, (actual, e, s) in enumerate(zip(outputs(function), exact, same, strict=True)):
            what = "output" if index == 0 else f"gradient {index}"
            assert_within_budget(f"{name} {case.name} {variant} {what}", actual, e, s)


def _measure(case: OpCase, variants: dict[str, Call], *, backward: bool, seconds: float) -> list[Row]:
    x = case.inputs()[0][0]
    copies = max(1, min(16, _ROTATED_BYTES // max(1, x.nbytes)))
    inputs = [_with_grad(case, seed) for seed in range(copies)]
    calls: dict[str, Callable[[int], object]] = {}
    calls[_COPY] = lambda i: inputs[i][0][0].detach().clone()
    if backward:
        dy = torch.randn_like(x)
        for name, function in variants.items():
            graphs = [(function(*args, **kwargs), leaves) for args, kwargs, leaves in inputs]
            calls[name] = partial(_backward, graphs, dy)
    else:
        for name, function in variants.items():
            calls[name] = partial(_forward, function, inputs)

    with torch.set_grad_enabled(False):
        times = _interleave(calls, copies, seconds)
    copy_rate = 2 * x.nbytes / _quantile(times[_COPY], 0.5)
    rows = []
    for name, values in times.items():
        moved = 2 * x.nbytes if name == _COPY else case.bytes(backward=backward)
        rate = moved / _quantile(values, 0.5)
        rows.append(
            {
                "backend": name,
                "mode": "backward" if backward else "forward",
                "p20_ms": round(_quantile(values, 0.2) * 1e3, 5),
                "p50_ms": round(_quantile(values, 0.5) * 1e3, 5),
                "p80_ms": round(_quantile(values, 0.8) * 1e3, 5),
                "gb_per_s": round(rate / 1e9, 3),
                "share_of_copy": round(rate / copy_rate, 3),
                "samples": len(values),
            }
        )
    return rows


def _forward(function: Call, inputs: Sequence[tuple[list[Any], dict[str, Any], list[Tensor]]], i: int) -> object:
    return function(*inputs[i][0], **inputs[i][1])


def _backward(graphs: Sequence[tuple[Tensor, list[Tensor]]], dy: Tensor, i: int) -> object:
    y, leaves = graphs[i]
    return torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _interleave(calls: dict[str, Callable[[int], object]], copies: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each launch, the variants taking turns on the same buffer."""
    for call in calls.values():
        for i in range(min(3, copies)):
            call(i)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 7 or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call(turn % copies)
            times[name].append(time.perf_counter() - start)
        turn += 1
    return times


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def environment() -> Row:
    """Where a row was measured: device, versions, commit, date."""
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # others at work on this machine make every figure worse
        "isa": native.cpu_isa(),
        "javis": javis.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": native.build_info().get("compiler"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # an installed package is no checkout
        return None
    return done.stdout.strip()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def render(rows: Sequence[Row], console: Console) -> None:
    """Print the rows of ``run``, one table per op: milliseconds, and speed-up of the medians against eager."""
    where = "{device}, {threads} threads, {isa}, torch {torch}, load {load}".format(**rows[0])
    console.print(where, highlight=False, markup=False)
    eager = {(r["op"], r["case"], r["mode"]): r["p50_ms"] for r in rows if r["backend"] == _EAGER}
    for op in dict.fromkeys(row["op"] for row in rows):
        table = Table(title=op, title_justify="left", box=None, pad_edge=False)
        for column in ("case", "mode", "backend"):
            table.add_column(column, overflow="fold")
        for column in ("p20", "p50", "p80 ms", "GB/s", "of copy", "x eager"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            if row["op"] == op:
                base = eager[row["op"], row["case"], row["mode"]]
                numbers = [f"{row[key]:.3f}" for key in ("p20_ms", "p50_ms", "p80_ms")]
                share, gain = f"{row['share_of_copy']:.0%}", f"{base / row['p50_ms']:.2f}"
                cells = [row["case"], row["mode"], row["backend"], *numbers, f"{row['gb_per_s']:.1f}", share]
                table.add_row(*cells, "" if row["backend"] == _COPY else gain)
        console.print(table)


if __name__ == "__main__":
    import tyro

    render(run(tyro.cli(BenchConfig)), Console())
