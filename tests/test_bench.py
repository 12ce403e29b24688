"""The microbenchmarks: no time without a green gate, rows that say where they come from."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from javis import bench
from javis.bench import BenchConfig
from javis.errors import UsageError
from javis.kernels import native
from javis.kernels.ops.ada_layer_norm.cases import AdaLayerNormCase
from javis.kernels.registry import OPS


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [AdaLayerNormCase(name=name, places=6, width=40) for name in ("first", "second")]
    monkeypatch.setitem(OPS, "ada_layer_norm", replace(OPS["ada_layer_norm"], cases=lambda: cases))


def quick(**options: object) -> BenchConfig:
    return BenchConfig(**{"seconds": 0.001, "append": False} | options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_cases")
def test_rows(tmp_path: Path) -> None:
    seen: list[dict[str, object]] = []
    rows = bench.run(quick(case="second", threads=1, json=tmp_path / "rows.json"), seen.append)
    assert rows == seen == json.loads((tmp_path / "rows.json").read_text())
    assert {row["case"] for row in rows} == {"second"}
    assert {row["mode"] for row in rows} == {"forward", "backward"}
    assert {"copy", "eager", "reference"} <= {row["backend"] for row in rows}
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["samples"] >= 7
        assert row["threads"] == 1
        assert {"device", "torch", "javis", "commit", "dirty", "date", "isa"} <= row.keys()
    # x is 6 x 40 float32 values; the copy reads and writes them, and is its own peak.
    copy = next(row for row in rows if row["backend"] == "copy")
    assert copy["gb_per_s"] == pytest.approx(2 * 6 * 40 * 4 / copy["p50_ms"] / 1e6, rel=0.05, abs=1e-3)
    assert copy["share_of_copy"] == 1.0


@pytest.mark.usefixtures("small_cases")
def test_a_red_gate_prints_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = OPS["ada_layer_norm"].function

    def wrong(x: Tensor, shift: Tensor, scale: Tensor, *, backend: str, **kwargs: Tensor) -> Tensor:
        y = right(x, shift, scale, backend=backend, **kwargs)
        return y if backend == "reference" else y * 1.004

    monkeypatch.setitem(OPS, "ada_layer_norm", replace(OPS["ada_layer_norm"], function=wrong))
    seen: list[dict[str, object]] = []
    if native.WHY_NOT is not None:
        pytest.skip(native.WHY_NOT)
    with pytest.raises(AssertionError, match="ada_layer_norm first cpu output: max error"):
        bench.run(quick(json=tmp_path / "rows.json"), seen.append)
    assert not seen
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.usefixtures("small_cases")
def test_rows_are_appended_where_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    bench.run(quick(case="first", append=True))
    assert not list(tmp_path.iterdir())  # no results folder, nothing written
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    once = bench.run(quick(case="first", append=True))
    bench.run(quick(case="first", append=True))
    (file,) = (tmp_path / "benchmarks/results").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2 * len(once)
    assert lines[: len(once)] == once


@pytest.mark.usefixtures("small_cases")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "softmax"}, "unknown op 'softmax': expected one of ada_layer_norm"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
        ({"backend": "triton"}, "'triton' cannot run first: no triton kernel in this version"),
        ({"case": "third"}, "no case matches"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.run(quick(**options))


def test_table_shows_speed_against_eager() -> None:
    row = {
        "op": "ada_layer_norm", "case": "c", "mode": "forward", "p20_ms": 1.0, "p80_ms": 3.0, "gb_per_s": 1.5,
        "share_of_copy": 0.5, "device": "D", "threads": 2, "isa": "avx2", "torch": "2.13", "load": 0.1,
    }  # fmt: skip
    out = io.StringIO()
    bench.render(
        [row | {"backend": "cpu", "p50_ms": 2.0}, row | {"backend": "eager", "p50_ms": 5.0}], Console(file=out)
    )
    assert "2.50" in out.getvalue()
    assert "50%" in out.getvalue()


def test_bytes_and_flops_of_a_case_by_hand() -> None:
    case = AdaLayerNormCase(name="c", dtype=torch.bfloat16, batch=2, frames=3, places=4, width=5)
    assert case.bytes() == 2 * (2 * 12 * 5 * 2) + 2 * (2 * 5 * 2)  # x and y; shift and scale
    assert case.bytes(backward=True) == 3 * (2 * 12 * 5 * 2) + 4 * (
        2 * 5 * 2
    )  # x, dy, dx; two vectors and their gradients
    assert case.flops() == 9 * 120
