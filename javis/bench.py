"""Microbenchmarks of the ops: ``javis bench kernels``, or ``python -m javis.bench`` with the same options.

For each case: first the correctness gate (every backend against float64, forward and gradients), then warm-up, then
timing with the variants interleaved launch by launch (timing.py). Input buffers are rotated, so that a call does not
find its input in the cache from the call before. A red gate prints no time. float64 attention over a full-size clip
would take minutes and gigabytes, so the gate of a large case runs on the same call with fewer tokens; the row says
which. On the full-size call every variant is still compared with eager, coarsely: that finds offsets that overflow.

Baselines carry no gate: ``eager`` is the model's own default op (the best path of plain PyTorch; for an op that the
model does not have, the reference), and ``compiled eager`` is that under torch.compile, whose float32 sums over tokens
would leave the budget. ``copy`` moves the bytes that the forward pass must move and ``matmul`` is a large square
product in the case's dtype, timed among the variants and before and after them; their speeds are the peaks that shares
are stated of.

Rows are appended to ``benchmarks/results/<device>.jsonl``; a figure without its row does not exist.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from javis.bench_environment import environment
from javis.errors import UsageError
from javis.kernels import choices
from javis.kernels.backend import Backend, why_not_auto
from javis.kernels.cases import OpCase
from javis.kernels.registry import OPS, Op
from javis.kernels.testing import assert_within_budget
from javis.model.ops import ModelOps
from javis.timing import Timed, interleave, quantile

if TYPE_CHECKING:
    from rich.console import Console

RESULTS = Path("benchmarks/results")
MODES = ("forward", "backward", "forward+backward")
_ROTATED_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # more than the cache: the share of a core, the L2 of a GPU
_MATMUL_SIZE = {"cpu": 1024, "cuda": 4096}
_GATE_FLOPS, _GATE_BYTES = 4e9, 300e6  # what the gate's forward pass may need; a second or two in float64 on one core
_COPY, _MATMUL = "copy", "matmul"
_EAGER, _COMPILED = "eager", "compiled eager"
_LIBRARIES = ("sdpa", "flash_attn", "onednn")  # backends whose code is not ours
log = logging.getLogger("javis.bench")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure and where the rows go."""

    op: str | None = None  # one op; None: all
    shape: str | None = None  # only cases whose name contains this
    backend: str | None = None  # one backend beside the baselines; None: all that run here
    device: Literal["cpu", "cuda"] | None = None  # None: the GPU if there is one
    seconds: float = 1.0  # time spent on each case and mode
    threads: int | None = None  # CPU threads; None: as torch is set up
    compiled: bool = False  # also time the eager baseline under torch.compile
    json: Path | None = None  # write the rows of this run here as one JSON list
    plot: Path | None = None  # draw the speed-up over eager here, as PNG
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
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device 'cuda' was asked for, but torch finds none; see `javis doctor`")
        for path in (self.json, self.plot):
            if path is not None and not path.absolute().parent.is_dir():
                raise UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}")


Row = dict[str, Any]
Call = Callable[..., Any]


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
        rows = _run(config, report)
    finally:
        torch.set_num_threads(before)
    if not rows:
        raise UsageError(f"no case matches op={config.op!r}, shape={config.shape!r}")
    if config.json is not None:
        config.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if config.plot is not None:
        from javis.bench_plot import plot_speedup

        plot_speedup(rows, config.plot)
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
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = environment(device)
    rows = []
    for name, op in OPS.items():
        if config.op not in (None, name):
            continue
        for case in op.cases():
            if (config.shape or "") not in case.name:
                continue
            gate = case.smaller(flops=_GATE_FLOPS, bytes=_GATE_BYTES)
            variants = _variants(name, op, gate, config, device)
            errors = check(name, gate, variants, device)
            for library in variants.keys() - errors.keys():
                del variants[library]  # outside its budget: said in the log, and no time is printed
            _compare_with_eager(name, case, variants, device)
            about: Row = {"op": name, "case": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
            about |= {"gate": "full" if gate == case else _difference(gate, case)}
            for mode in MODES if case.differentiable else MODES[:1]:
                about["bucket"] = _bucket(op, case, mode, device)
                for row in _measure(case, variants, mode, config.seconds, device):
                    error = errors.get(row["backend"], {}).get("forward" if mode == "forward" else "backward")
                    rows.append({**about, **row, "max_error": error, **where})
                    report(rows[-1])
    return rows


def _bucket(op: Op, case: OpCase, mode: str, device: str) -> str | None:
    """Which calls of ``auto`` this measurement speaks for."""
    args, kwargs, _ = _inputs(case, 0, device)
    with torch.set_grad_enabled(mode != "forward"):
        return choices.bucket_of(op.function, op.checks, args, kwargs)


def _difference(gate: OpCase, case: OpCase) -> str:
    fields = [f.name for f in dataclasses.fields(case) if getattr(case, f.name) != getattr(gate, f.name)]
    return "with " + ", ".join(f"{name}={getattr(gate, name)}" for name in fields)


def _variants(name: str, op: Op, case: OpCase, config: BenchConfig, device: str) -> dict[str, Call]:
    """Callables under the names their rows carry: backends first, then baselines."""
    args, kwargs = case.inputs(device=device)
    wanted = list(op.checks) if config.backend is None else [Backend.parse(config.backend)]
    variants: dict[str, Call] = {}
    for backend in wanted:
        # Not why_not: an interpreted kernel can run, but its time says nothing.
        reason = why_not_auto(op.checks, backend, *args, *kwargs.values())
        if reason is None:
            variants[backend.value] = partial(op.function, backend=backend)
        elif config.backend is not None:
            raise UsageError(f"{name}: backend {config.backend!r} cannot run {case.name}: {reason}")
    variants[_EAGER] = getattr(ModelOps(), name, partial(op.function, backend=Backend.REFERENCE))
    if config.compiled:
        torch.compiler.reset()  # each case compiles afresh, for its own shape
        variants[_COMPILED] = torch.compile(variants[_EAGER], fullgraph=True)
    return variants


Inputs = tuple[list[Any], dict[str, Any], list[Tensor]]


def _inputs(case: OpCase, seed: int, device: str, dtype: torch.dtype | None = None) -> Inputs:
    """Arguments of a case with gradients switched on, and the list of those that have one."""
    args, kwargs = case.inputs(seed=seed, device=device)

    def ready(value: Any, gradient: bool = case.differentiable) -> Any:
        if isinstance(value, tuple):  # tables (RoPE) and folded weights: they take no gradient
            parts = [ready(part, False) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, Tensor) and value.is_floating_point():
            # A single number (a scale) is exact in any dtype, and its dtype may be part of the contract.
            wanted = value.dtype if dtype is None or value.numel() == 1 else dtype
            return value.detach().to(wanted).requires_grad_(gradient)
        return value

    ready_args, ready_kwargs = [ready(a) for a in args], {k: ready(v) for k, v in kwargs.items()}
    leaves = [v for v in [*ready_args, *ready_kwargs.values()] if isinstance(v, Tensor) and v.requires_grad]
    return ready_args, ready_kwargs, leaves


def _tensors(result: Any) -> list[Tensor]:
    """The outputs of an op, one or several."""
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]


def _gradients(result: Any, leaves: list[Tensor], dys: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
    """Gradients of the leaves; ``dys`` are reused where they are given, for one fixed seed otherwise."""
    outputs = [y for y in _tensors(result) if y.requires_grad]
    if dys is None:
        dys = _upstream(outputs)
    return torch.autograd.grad(outputs, leaves, dys, materialize_grads=True)


def _upstream(outputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator).to(dtype or y.dtype).to(y) for y in outputs]


def check(name: str, case: OpCase, variants: dict[str, Call], device: str = "cpu") -> dict[str, dict[str, float]]:
    """The correctness gate: every backend within its budget on this case, forward and all gradients.

    Returns:
        By variant, baselines included: the largest error of "forward" and of "backward", relative to the largest value
        of the tensor it is in.

        A library outside its budget is missing, with a warning, unless it is the only backend: PyTorch's float32
        attention on CPU is, at some shapes, and that is no reason to measure nothing.

    Raises:
        AssertionError: a backend of this package, or the only one, is outside its budget.
    """

    def outputs(function: Call, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        args, kwargs, leaves = _inputs(case, 0, device, dtype)
        result = function(*args, **kwargs)
        found = {f"output {i}": y.detach() for i, y in enumerate(_tensors(result))}
        if case.differentiable:
            dys = _upstream([y for y in _tensors(result) if y.requires_grad], case.dtype)
            found |= {f"gradient {i}": g for i, g in enumerate(_gradients(result, leaves, dys))}
        return found

    reference = partial(OPS[name].function, backend=Backend.REFERENCE)
    exact, same = outputs(reference, torch.float64), outputs(reference)
    errors: dict[str, dict[str, float]] = {}
    backends = variants.keys() - {_EAGER, _COMPILED}
    for variant, function in variants.items():
        actual = outputs(function)
        found = {"forward": 0.0, "backward": 0.0}
        try:
            for what, value in actual.items():
                if variant in backends:
                    assert_within_budget(f"{name} {case.name} {variant} {what}", value, exact[what], same[what])
                mode = "forward" if what.startswith("output") else "backward"
                found[mode] = max(found[mode], _relative(value, exact[what]))
        except AssertionError as red:
            if variant not in _LIBRARIES or backends == {variant}:
                raise
            log.warning("no time for %s: %s", variant, red)
            continue
        errors[variant] = found
    return errors


def _relative(actual: Tensor, exact: Tensor) -> float:
    if actual.numel() == 0:
        return 0.0
    size = exact.double().abs().amax().item()
    return (actual.double() - exact.double()).abs().amax().item() / (size or 1.0)


@torch.no_grad()
def _compare_with_eager(name: str, case: OpCase, variants: dict[str, Call], device: str) -> None:
    """On the very call that is timed: no variant is anywhere far from eager."""
    args, kwargs, _ = _inputs(case, 0, device)
    expected = _tensors(variants[_EAGER](*args, **kwargs))
    for variant, function in variants.items():
        if variant != _EAGER:
            for i, (a, e) in enumerate(zip(_tensors(function(*args, **kwargs)), expected, strict=True)):
                close = (a.float() - e.float()).abs().amax() <= 0.1 * e.float().abs().amax()
                assert bool(close), f"{name} {case.name} {variant} output {i}: far from eager on the full-size call"


def _measure(case: OpCase, variants: dict[str, Call], mode: str, seconds: float, device: str) -> list[Row]:
    copies = max(1, min(16, _ROTATED_BYTES[device] // max(1, case.bytes())))
    inputs = [_inputs(case, seed, device) for seed in range(copies)]
    buffer = torch.zeros(max(1, case.bytes() // 2), dtype=torch.uint8, device=device)
    side = _MATMUL_SIZE[device]
    square = torch.randn(side, side, device=device).to(case.dtype)
    calls = {name: _timed(function, inputs, mode) for name, function in variants.items()}
    calls[_COPY] = Timed(lambda i: buffer.clone())
    calls[_MATMUL] = Timed(lambda i: square @ square, aside=True)
    with torch.set_grad_enabled(mode != "forward"):
        times, timer = interleave(calls, copies, seconds, device)

    p50 = {name: quantile(values, 0.5) for name, values in times.items()}
    bytes_per_s, flops_per_s = 2 * buffer.nbytes / p50[_COPY], 2 * side**3 / p50[_MATMUL]
    work = {name: _work(case, mode) for name in variants}
    work |= {_COPY: (2 * buffer.nbytes, 0), _MATMUL: (3 * square.nbytes, 2 * side**3)}
    # What would take longer on this machine at full speed, moving the bytes or doing the FLOPs; the two peaks are what
    # they are, however noisy the other one was.
    slower = {
        name: "flops" if flops / flops_per_s > moved / bytes_per_s else "bytes" for name, (moved, flops) in work.items()
    }
    bound = slower | {_COPY: "bytes", _MATMUL: "flops"}
    rows = []
    for name, values in times.items():
        moved, flops = work[name]
        rows.append(
            {
                "backend": name,
                "mode": mode,
                "p20_ms": round(quantile(values, 0.2) * 1e3, 5),
                "p50_ms": round(p50[name] * 1e3, 5),
                "p80_ms": round(quantile(values, 0.8) * 1e3, 5),
                "gb_per_s": round(moved / p50[name] / 1e9, 3),
                "share_of_copy": round(moved / p50[name] / bytes_per_s, 3),
                "tflop_per_s": round(flops / p50[name] / 1e12, 5),
                "share_of_matmul": round(flops / p50[name] / flops_per_s, 3),
                "bound": bound[name],
                "samples": len(values),
                "timer": timer,
            }
        )
    return rows


def _work(case: OpCase, mode: str) -> tuple[int, int]:
    """Bytes and FLOPs of a mode."""
    passes = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}[mode]
    return sum(case.bytes(backward=b) for b in passes), sum(case.flops(backward=b) for b in passes)


def _timed(function: Call, inputs: Sequence[Inputs], mode: str) -> Timed:
    def forward(i: int) -> Any:
        return function(*inputs[i][0], **inputs[i][1])

    if mode == "forward":
        return Timed(forward)
    dys = _upstream([y for y in _tensors(forward(0)) if y.requires_grad])

    def backward(given: tuple[Any, int]) -> object:
        return _gradients(given[0], inputs[given[1]][2], dys)

    if mode == "backward":  # the graph is made anew each time, so that only one is in memory
        return Timed(backward, prepare=lambda i: (forward(i), i))
    return Timed(lambda i: backward((forward(i), i)))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def render(rows: Sequence[Row], console: Console) -> None:
    """Print the rows of ``run``, one table per case: milliseconds, speed, error, speed-up of the medians over eager."""
    from rich.table import Table

    where = "{device}, {threads} threads, {isa}, torch {torch}, load {load}".format(**rows[0])
    console.print(where, highlight=False, markup=False)
    eager = {(r["op"], r["case"], r["mode"]): r["p50_ms"] for r in rows if r["backend"] == _EAGER}
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["case"]) == (op, case)]
        gate = "" if mine[0]["gate"] == "full" else f" (compared with float64 {mine[0]['gate']})"
        title = f"{op}, {case}{gate}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
        for column in ("mode", "backend"):
            table.add_column(column, overflow="fold")
        for column in ("p20", "p50", "p80 ms", "speed", "of peak", "error", "x eager"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in mine:
            numbers = [f"{row[key]:.3f}" for key in ("p20_ms", "p50_ms", "p80_ms")]
            if row["bound"] == "flops":
                speed, share = f"{row['tflop_per_s']:.3f} TFLOP/s", f"{row['share_of_matmul']:.0%}"
            else:
                speed, share = f"{row['gb_per_s']:.1f} GB/s", f"{row['share_of_copy']:.0%}"
            error = "" if row["max_error"] is None else f"{row['max_error']:.0e}"
            base = eager[op, case, row["mode"]]
            gain = "" if row["backend"] in (_COPY, _MATMUL) else f"{base / row['p50_ms']:.2f}"
            mode = row["mode"].replace("forward+backward", "both")
            table.add_row(mode, row["backend"], *numbers, speed, share, error, gain)
        console.print(table)


if __name__ == "__main__":
    import tyro
    from rich.console import Console

    from javis.host_memory import ask_for_huge_pages

    ask_for_huge_pages()
    render(run(tyro.cli(BenchConfig)), Console())
