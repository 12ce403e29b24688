"""The cases of `javis bench kernels` under pytest-benchmark, for its histories and comparisons:

    pytest benchmarks --benchmark-only -k "ada_layer_norm and demo"
    pytest benchmarks --benchmark-only --benchmark-autosave, later --benchmark-compare

One group per op, case and mode, so that its table shows the backends side by side. As in `javis bench kernels`, a
backend is timed only if the correctness gate is green. Times here are not interleaved and the inputs are not rotated:
the rows that this project states come from `javis bench kernels`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch

from javis import bench
from javis.kernels import OPS

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def _checked(name: str, case: Any) -> dict[str, Any]:
    """The variants of a case, once the gate is green."""
    gate = case.smaller(flops=bench._GATE_FLOPS, bytes=bench._GATE_BYTES)
    variants = bench._variants(name, OPS[name], gate, bench.BenchConfig(op=name), DEVICE)
    bench.check(name, gate, variants, DEVICE)
    return variants


def _parameters() -> list[Any]:
    found = []
    for name, op in OPS.items():
        for case in op.cases():
            for backend in [*(b.value for b in op.checks), "eager"]:
                for mode in ("forward", "forward+backward") if case.differentiable else ("forward",):
                    found.append(pytest.param(name, case, backend, mode, id=f"{name}-{case.name}-{backend}-{mode}"))
    return found


@pytest.mark.parametrize(("name", "case", "backend", "mode"), _parameters())
def test_op(benchmark: Any, name: str, case: Any, backend: str, mode: str) -> None:
    variants = _checked(name, case)
    if backend not in variants:
        pytest.skip(f"{backend} does not run {case.name} here; `javis doctor` says why")
    benchmark.group = f"{name}, {case.name}, {mode}, {DEVICE}"
    inputs = [bench._inputs(case, 0, DEVICE)]
    call = partial(bench._timed(variants[backend], inputs, mode), 0)

    def finished() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.set_grad_enabled(mode != "forward"):
        benchmark(finished)
