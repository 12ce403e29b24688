"""Ahead-of-time compilation: what the gates see, in processes without TRITON_INTERPRET."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from javis.errors import UsageError
from javis.kernels import aot
from javis.kernels.registry import NAMES

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(tmp_path: Path, *specs: str) -> list[dict[str, Any]]:
    """Compile specs of aot_kernels.py for sm_90, written as Python, in a fresh process."""
    code = (
        "import dataclasses, json; from javis.kernels import aot; from tests.kernels.aot_kernels import *\n"
        f"results = [aot.compile_spec('op', spec, 90) for spec in [{', '.join(specs)}]]\n"
        "print(json.dumps([dataclasses.asdict(result) | {'red': result.red()} for result in results]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@needs_triton
def test_gates(tmp_path: Path) -> None:
    small, spilling, alternative, large, wrong, broken = compiled(
        tmp_path,
        "row_sum_spec()",
        "product_spec(warps=1)",
        "product_spec(warps=1, default=False)",
        "product_spec(stages=5)",
        "row_sum_spec(constants={})",
        "row_sum_spec(block=500)",  # no power of two
    )
    assert small["red"] is None
    assert 8 <= small["registers"] <= 64 and small["local"] == 0 and 0 < small["shared"] <= 1024
    assert spilling["red"].startswith("spills") and spilling["spill_stores"] > 500 and spilling["local"] > 500
    assert alternative["red"] is None and alternative["local"] == spilling["local"]
    assert "bytes of shared memory, limit 232448" in large["red"] and large["shared"] > 4 * 65536
    assert "['BLOCK']" in wrong["red"]
    assert "power of 2" in broken["red"]
    entries = list((tmp_path / "javis" / "aot").glob("*.json"))
    assert len(entries) == 3  # errors are not kept; whether it is a default changes the gate, not the kernel


@needs_triton
@pytest.mark.slow
def test_cache_knows_what_it_depends_on(tmp_path: Path) -> None:
    compiled(tmp_path, "row_sum_spec()")
    (entry,) = (tmp_path / "javis" / "aot").glob("*.json")
    stored = json.loads(entry.read_text())
    entry.write_text(json.dumps(stored | {"registers": 77}))
    same, wide, more, unaligned = compiled(
        tmp_path, "row_sum_spec()", "row_sum_spec(1024)", "row_sum_spec(num_warps=8)", "row_sum_spec(aligned=())"
    )
    assert same["registers"] == 77
    assert all(other["registers"] != 77 for other in (wide, more, unaligned))


def test_it_refuses_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="TRITON_INTERPRET=1 is set"):
        aot.run(aot.AotConfig())
    monkeypatch.setattr(aot, "HAS_TRITON", False)
    with pytest.raises(UsageError, match="not installed"):
        aot.run(aot.AotConfig())
    with pytest.raises(UsageError, match="unknown op"):
        aot.AotConfig(op="nothing")
    with pytest.raises(UsageError, match="expected some of 80, 90, 100"):
        aot.AotConfig(arch=(75,))


def test_gates_by_hand() -> None:
    result = aot.Result(op="op", spec="a", arch=90, default=True, num_warps=4, num_stages=2, registers=255)
    assert result.red() is None
    change = dataclasses.replace
    assert change(result, local=8).red() == "spills: 8 bytes a thread, 0 stored, 0 loaded"
    assert change(result, local=8, arch=80).red() is None
    assert change(result, local=8, default=False).red() is None
    assert change(result, shared=227 * 1024).red() is None
    assert change(result, shared=227 * 1024 + 1).red() is not None
    assert change(result, shared=164 * 1024, arch=80).red() is not None
    assert change(result, shared=164 * 1024, arch=100).red() is None
    assert change(result, error="ptxas failed", default=False).red() == "ptxas failed"


def test_table_marks_what_is_red() -> None:
    good = aot.Result(op="op", spec="a", arch=80, default=True, num_warps=4, num_stages=2, registers=40, shared=2048)
    lines = list(aot.table([good, dataclasses.replace(good, arch=90, local=16), dataclasses.replace(good, arch=100)]))
    assert lines[1].split() == ["a", "4w", "2s", "40", "0", "2.0", "40", "16", "2.0", "!", "40", "0", "2.0"]
    assert lines[2] == "RED  op, a, sm_90: spills: 16 bytes a thread, 0 stored, 0 loaded"
    assert lines[3] == "3 compiled, 1 red"
    assert list(aot.table([good]))[-1] == "1 compiled, all green"


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_a_green_default(name: str, tmp_path: Path) -> None:
    """The first default configuration of each op; `make aot` goes over all of them."""
    if importlib.util.find_spec(f"javis.kernels.ops.{name}.triton_impl") is None:
        pytest.skip(f"{name} has no Triton kernel")
    (result,) = compiled(tmp_path, f"next(spec for spec in aot.collect('{name}')['{name}'] if spec.default)")
    assert result["red"] is None
