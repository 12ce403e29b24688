"""The roofline picture: peaks and points by hand, and a picture from the committed rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks/roofline.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks.roofline import main, panels, peaks, points  # noqa: E402
from javis.kernels.registry import OPS  # noqa: E402

CASE = OPS["gelu_linear"].cases()[0]


def row(backend: str, ms: float, gb: float = 1.0, tflop: float = 1.0, **more: Any) -> dict[str, Any]:
    about = {"op": "gelu_linear", "case": CASE.name, "mode": "forward", "dtype": "float32", "device": "D", "threads": 2}
    return about | {"backend": backend, "p50_ms": ms, "gb_per_s": gb, "tflop_per_s": tflop} | more


def test_peaks_are_those_of_memory_and_of_the_matrix_product() -> None:
    rows = [row("copy", 0.01, 90), row("copy", 2, 10), row("copy", 3, 12), row("matmul", 1, 1, 0.1)]
    assert peaks(rows) == (11e9, 0.1e12)  # 20 and 36 MB; the copy of 0.9 MB was in the cache
    assert peaks([row("copy", 0.01, 90), row("copy", 0.2, 20)]) == (20e9, None)


def test_points_are_the_fastest_backend_and_eager() -> None:
    rows = [row("cpu", 20), row("triton", 10), row("eager", 40), row("reference", 5), row("copy", 1)]
    flops, moved = 2 * 6075 * 1152 * 4608, 4 * (6075 * (1152 + 4608) + 1152 * 4608)
    expected = [(flops / moved, flops / 0.01 / 1e12, "triton"), (flops / moved, flops / 0.04 / 1e12, "eager")]
    (found,) = points(rows).values()
    for actual, wanted in zip(found, expected, strict=True):
        assert actual[:2] == pytest.approx(wanted[:2]) and actual[2] == wanted[2]


def test_the_newest_row_counts_and_other_rows_do_not() -> None:
    rows = [
        row("cpu", 2),
        row("cpu", 1),
        row("cpu", 3, mode="backward"),
        {"bench": "other"},
        row("cpu", 4, case="gone"),
    ]
    assert panels(rows) == {("D, 2 threads", "float32"): [rows[1]]}
    assert list(panels([row("cpu", 2, cuda="13.0", threads=16)])) == [("D", "float32")]


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "roofline.png"
    assert main(["--results", str(ROOT / "benchmarks/results"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [row("cpu", 1, 1, 1)]))
    assert main(["--results", str(tmp_path), "--out", str(out)]) == 1
    assert "javis bench kernels" in capsys.readouterr().err
