"""The microbenchmarks: no time without a green gate, rows that say where they come from."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor

from javis import bench, bench_environment
from javis.bench import BenchConfig
from javis.bench_environment import environment
from javis.bench_plot import plot_speedup
from javis.errors import UsageError
from javis.kernels import native
from javis.kernels.backend import Backend, Check
from javis.kernels.cases import OpCase
from javis.kernels.choices import device_class
from javis.kernels.ops.ada_layer_norm.cases import AdaLayerNormCase
from javis.kernels.registry import NAMES, OPS, Op
from javis.timing import Timed, interleave, quantile

ROW: dict[str, Any] = {
    "op": "ada_layer_norm", "case": "c", "mode": "forward", "p20_ms": 1.0, "p80_ms": 3.0, "gb_per_s": 1.5,
    "share_of_copy": 0.5, "tflop_per_s": 0.25, "share_of_matmul": 0.25, "bound": "bytes", "max_error": 3e-6,
    "gate": "with places=7", "device": "D", "threads": 2, "isa": "avx2", "torch": "2.13", "load": 0.1,
}  # fmt: skip


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [AdaLayerNormCase(name=name, places=6, width=40) for name in ("first", "second")]
    monkeypatch.setitem(OPS, "ada_layer_norm", replace(OPS["ada_layer_norm"], cases=lambda: cases))


def quick(**options: object) -> BenchConfig:
    return BenchConfig(**{"seconds": 0.001, "append": False} | options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_cases")
def test_rows(tmp_path: Path) -> None:
    seen: list[dict[str, object]] = []
    rows = bench.run(quick(shape="second", threads=1, json=tmp_path / "rows.json"), seen.append)
    assert rows == seen == json.loads((tmp_path / "rows.json").read_text())
    assert {row["case"] for row in rows} == {"second"}
    assert {row["mode"] for row in rows} == {"forward", "backward", "forward+backward"}
    assert {"copy", "matmul", "eager", "reference"} <= {row["backend"] for row in rows}
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["samples"] >= 7
        assert row["threads"] == 1
        assert {"device", "torch", "javis", "commit", "dirty", "date", "isa"} <= row.keys()
        assert row["gate"] == "full" and row["timer"] == "clock"
        kind = "inference" if row["mode"] == "forward" else "training"
        assert row["bucket"] == f"{kind} float32[1,8,40] float32[1,40] float32[1,40] - - -"
        assert row["device_class"] == device_class("cpu")
    # x and y are 6 x 40 float32 values, shift and scale 40; the copy moves as much, and each peak is its own.
    by = {(row["backend"], row["mode"]): row for row in rows}
    copy, matmul, eager = (by[name, "forward"] for name in ("copy", "matmul", "eager"))
    moved = 4 * (2 * 6 * 40 + 2 * 40)
    assert copy["gb_per_s"] == pytest.approx(moved / copy["p50_ms"] / 1e6, rel=0.05, abs=1e-3)
    assert copy["share_of_copy"] == 1.0
    assert matmul["tflop_per_s"] == pytest.approx(2 * 1024**3 / matmul["p50_ms"] / 1e9, rel=0.05)
    assert matmul["share_of_matmul"] == 1.0
    assert matmul["bound"] == "flops"
    assert eager["gb_per_s"] == pytest.approx(moved / eager["p50_ms"] / 1e6, rel=0.05, abs=1e-3)
    assert 0 < eager["max_error"] < 1e-6
    assert copy["max_error"] is None
    both = by["eager", "forward+backward"]
    flops = (9 + 14) * 240
    assert both["tflop_per_s"] == pytest.approx(flops / both["p50_ms"] / 1e9, rel=0.1, abs=1e-5)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_rows_that_were_just_written_are_no_change_of_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, code = tmp_path / "benchmarks/results/cpu.jsonl", tmp_path / "code.py"
    rows.parent.mkdir(parents=True)
    for file in (rows, code):
        file.write_text("one\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(bench_environment, "CHECKOUT", tmp_path)
    rows.write_text("two\n")
    assert environment()["dirty"] is False
    code.write_text("two\n")
    assert environment()["dirty"] is True


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_code_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    heads = {}
    for name in ("someone", "checkout"):
        (tmp_path / name).mkdir()
        for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", name]):
            subprocess.run(["git", *command], cwd=tmp_path / name, check=True)
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tmp_path / name, capture_output=True)
        heads[name] = head.stdout.decode().strip()
    monkeypatch.chdir(tmp_path / "someone")
    monkeypatch.setattr(bench_environment, "CHECKOUT", tmp_path / "checkout")
    assert environment()["commit"] == heads["checkout"] != heads["someone"]
    installed = tmp_path / "someone" / "site-packages"  # inside a repository, and no checkout
    installed.mkdir()
    monkeypatch.setattr(bench_environment, "CHECKOUT", installed)
    assert environment()["commit"] is None


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
    with pytest.raises(AssertionError, match="ada_layer_norm first cpu output 0: max error"):
        bench.run(quick(json=tmp_path / "rows.json"), seen.append)
    assert not seen
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.parametrize(("backend", "alone"), [("sdpa", False), ("sdpa", True), ("cpu", False)])
def test_a_red_library_costs_only_its_own_time(backend: str, alone: bool, caplog: pytest.LogCaptureFixture) -> None:
    case = min(OPS["factorized_attention"].cases(), key=lambda case: case.bytes())
    right = partial(OPS["factorized_attention"].function, backend="reference")
    variants: dict[str, bench.Call] = {backend: lambda *args, **kwargs: right(*args, **kwargs) * 1.01}
    if not alone:
        variants["triton"] = right
    if alone or backend == "cpu":
        with pytest.raises(AssertionError, match=f"{backend} output 0: max error"):
            bench.check("factorized_attention", case, variants)
    else:
        assert set(bench.check("factorized_attention", case, variants)) == {"triton"}
        assert "no time for sdpa: factorized_attention" in caplog.text


@pytest.mark.usefixtures("small_cases")
def test_rows_are_appended_where_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    bench.run(quick(shape="first", append=True))
    assert not list(tmp_path.iterdir())  # no results folder, nothing written
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    once = bench.run(quick(shape="first", append=True))
    bench.run(quick(shape="first", append=True))
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
        ({"backend": "triton"}, "'triton' cannot run first: "),
        ({"shape": "third"}, "no case matches"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.run(quick(**options))


def test_table_shows_speed_against_eager() -> None:
    out = io.StringIO()
    bench.render(
        [ROW | {"backend": "cpu", "p50_ms": 2.0}, ROW | {"backend": "eager", "p50_ms": 5.0}], Console(file=out)
    )
    assert "2.50" in out.getvalue()
    assert "50%" in out.getvalue()
    assert "1.5 GB/s" in out.getvalue()
    assert "3e-06" in out.getvalue()
    assert "ada_layer_norm, c (compared with float64 with places=7)" in out.getvalue()
    bench.render([ROW | {"backend": "eager", "p50_ms": 5.0, "bound": "flops"}], Console(file=out))
    assert "0.250 TFLOP/s" in out.getvalue()
    assert "25%" in out.getvalue()


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot_speedup([ROW | {"backend": "cpu", "p50_ms": 2.0}, ROW | {"backend": "eager", "p50_ms": 5.0}], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="there is no folder"):
        quick(plot=tmp_path / "nowhere" / "plot.png")


@dataclass(frozen=True, kw_only=True)
class PairCase(OpCase):
    """An op of two outputs that has no backward pass."""

    tokens: int = 10
    op: str = "pair"
    differentiable: ClassVar[bool] = False

    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(self.tokens, 4, generator=generator),), {"tables": (torch.ones(4), torch.zeros(4))}

    def bytes(self, *, backward: bool = False) -> int:
        return 3 * 16 * self.tokens

    def flops(self, *, backward: bool = False) -> int:
        return 8 * self.tokens


def pair(x: Tensor, *, tables: tuple[Tensor, Tensor], backend: Backend | str = "auto") -> tuple[Tensor, Tensor]:
    if x.requires_grad:
        raise RuntimeError("sampling only")
    return x * tables[0], x + tables[1]


@pytest.fixture
def pair_op(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: dict[Backend, Check] = {
        Backend.TRITON: lambda *_: None, Backend.CPU: lambda *_: None, Backend.REFERENCE: lambda *_: None
    }  # fmt: skip
    monkeypatch.setitem(OPS, "pair", Op(function=pair, checks=checks, cases=lambda: [PairCase(name="p")]))


@pytest.mark.usefixtures("pair_op")
def test_two_outputs_and_no_backward_pass() -> None:
    rows = bench.run(quick(op="pair"))
    assert {row["mode"] for row in rows} == {"forward"}
    # An interpreted kernel is not timed; eager is the reference where the model has no such op.
    assert {row["backend"] for row in rows} == {"cpu", "reference", "eager", "copy", "matmul"}
    with pytest.raises(UsageError, match="interpreter"):
        bench.run(quick(op="pair", backend="triton"))


@pytest.mark.usefixtures("pair_op")
def test_the_gate_of_a_large_case_takes_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_GATE_FLOPS", 30)
    sizes = []
    check = bench.check

    def recording(name: str, case: PairCase, *args: Any) -> dict[str, dict[str, float]]:
        sizes.append(case.tokens)
        return check(name, case, *args)

    monkeypatch.setattr(bench, "check", recording)
    assert {row["gate"] for row in bench.run(quick(op="pair"))} == {"with tokens=2"}
    assert sizes == [2]


@pytest.mark.usefixtures("pair_op")
def test_a_large_case_is_still_compared_with_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is right on few tokens and wrong beyond: the gate is green, the full-size call is not."""
    monkeypatch.setattr(bench, "_GATE_FLOPS", 30)

    def overflowing(x: Tensor, *, tables: tuple[Tensor, Tensor], backend: Backend | str = "auto") -> Any:
        first, second = pair(x, tables=tables)
        if Backend.parse(backend) is Backend.CPU and len(x) > 8:
            second = second.clone()
            second[8:] = 0
        return first, second

    monkeypatch.setitem(OPS, "pair", replace(OPS["pair"], function=overflowing))
    with pytest.raises(AssertionError, match="pair p cpu output 1: far from eager"):
        bench.run(quick(op="pair"))


@pytest.mark.parametrize("name", NAMES)
def test_every_op_passes_the_gate_on_its_smallest_case(name: str) -> None:
    case = min(OPS[name].cases(), key=lambda case: case.bytes())
    variants = bench._variants(name, OPS[name], case, quick(op=name), "cpu")
    errors = bench.check(name, case, variants)
    assert {"reference", "eager"} <= errors.keys()
    assert all(error["forward"] < 0.1 for error in errors.values())


def test_smaller_halves_the_largest_count() -> None:
    case = AdaLayerNormCase(name="c", batch=2, frames=16, places=40, width=10)
    assert case.smaller(flops=1e9, bytes=1e9) is case
    less = case.smaller(flops=9 * 2 * 16 * 10 * 10, bytes=1e9)
    assert (less.batch, less.frames, less.places, less.width) == (2, 16, 10, 10)
    least = case.smaller(flops=0, bytes=0)
    assert (least.batch, least.frames, least.places, least.width) == (1, 1, 1, 10)


def test_no_variant_finds_the_inputs_of_another_in_the_cache() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    interleave({name: Timed(numbers.append) for name, numbers in seen.items()}, 16, 0.0)
    turns = [numbers[3:] for numbers in seen.values()]  # without the warm-up
    for at_once in zip(*turns, strict=True):
        assert min(abs(x - y) for x in at_once for y in at_once if x != y) >= 5 and len(set(at_once)) == 3
    assert all(len(set(numbers)) == len(numbers) for numbers in turns)


def test_variants_take_turns() -> None:
    seen: list[tuple[str, int]] = []
    calls = {
        "a": Timed(lambda i: seen.append(("a", i))),
        "b": Timed(lambda given: seen.append(("b", given)), prepare=lambda i: i + 100),
        "long": Timed(lambda i: seen.append(("long", i)), aside=True),
    }
    times, timer = interleave(calls, 2, 0.0)
    assert timer == "clock"
    assert {name: len(values) for name, values in times.items()} == {"a": 7, "b": 7, "long": 7}
    names = [name for name, _ in seen[6:]]  # after the warm-up
    assert names[:3] == names[-4:-1] == ["long"] * 3
    turns = [tuple(names[i : i + 2]) for i in range(3, 17, 2)]
    assert set(turns) == {("a", "b"), ("b", "a")}
    assert {given for name, given in seen if name == "b"} == {100, 101}
    slow = {"slow": Timed(lambda i: None, prepare=lambda i: time.sleep(0.01))}
    assert quantile(interleave(slow, 1, 0.0)[0]["slow"], 0.5) < 0.005  # the preparation does not count
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.5, 1.0)] == [1.0, 3.0, 4.0]


def test_bytes_and_flops_of_a_case_by_hand() -> None:
    case = AdaLayerNormCase(name="c", dtype=torch.bfloat16, batch=2, frames=3, places=4, width=5)
    assert case.bytes() == 2 * (2 * 12 * 5 * 2) + 2 * (2 * 5 * 2)  # x and y; shift and scale
    assert case.bytes(backward=True) == 3 * (2 * 12 * 5 * 2) + 4 * (
        2 * 5 * 2
    )  # x, dy, dx; two vectors and their gradients
    assert case.flops() == 9 * 120
