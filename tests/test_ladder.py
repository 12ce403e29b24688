"""benchmarks/ladder.py at toy size: rungs compute the same, rows say what was measured, a wrong rung is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks/ladder.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks import ladder, rungs  # noqa: E402
from javis.model.ops import ModelOps  # noqa: E402
from javis.plan import PlanArgs, counts  # noqa: E402
from javis.precision import precision_of  # noqa: E402

QUICK = ["--quick", "--device", "cpu", "--repeats", "2", "--sample-seconds", "0.001", "--steps", "3", "1"]


def test_rows_say_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    arguments = [*QUICK, "--rungs", "upstream", "eager", "fused", "--guidance", "with", "--json", str(out)]
    arguments += ["--results", str(tmp_path)]
    assert ladder.main([*arguments, "--profile", str(tmp_path / "profile")]) == 0
    rows = json.loads(out.read_text())
    assert [(r["rung"], r["steps"]) for r in rows] == [(g, n) for g in ("upstream", "eager", "fused") for n in (3, 1)]
    for row in rows:
        assert row["measured_steps"] == 1 and row["multiplied_by"] == row["steps"] and row["samples"] == 2
        assert 0 < row["s_p20"] <= row["s_p50"] <= row["s_p80"] and row["cold_s"] > 0
        speed = row["tflop"] / row["s_p50"]  # of rounded numbers: half a last digit of each is what they may differ by
        assert row["tflop_per_s"] == pytest.approx(speed, abs=6e-5 + (5e-6 + 5e-6 * speed) / (row["s_p50"] - 5e-6))
        assert 0 < row["error_rms"] < 0.05 and row["latents_from_eager"] < 0.05
        assert {
            "device",
            "device_class",
            "torch",
            "commit",
            "date",
            "matmul_tflop_per_s",
            "copy_gb_per_s",
        } <= row.keys()
    (written,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line) for line in written.read_text().splitlines()] == rows
    by = {(r["rung"], r["steps"]): r for r in rows}
    assert by["upstream", 1]["condition_s"] == 0 < by["eager", 1]["condition_s"]
    assert by["upstream", 3]["tflop"] > by["eager", 3]["tflop"] > by["fused", 3]["tflop"] > by["fused", 1]["tflop"]
    assert "1 steps x 3" in capsys.readouterr().out
    assert len(list((tmp_path / "profile").glob("toy-guided-*.json.gz"))) == 3
    assert "Self CPU" in (tmp_path / "profile/toy-guided-fused.txt").read_text()


def test_a_wrong_rung_is_not_timed_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: Any) -> Tensor:
        return 1.2 * ModelOps().gelu_linear(*args)

    monkeypatch.setattr(ModelOps, "fused", classmethod(lambda cls: cls(gelu_linear=wrong)))
    out = tmp_path / "rows.json"
    assert ladder.main([*QUICK, "--rungs", "eager", "fused", "--guidance", "without", "--json", str(out)]) == 1
    rows = json.loads(out.read_text())
    assert [r["rung"] for r in rows if "error" not in r] == ["eager", "eager"]
    assert [r["rung"] for r in rows if "error" in r] == ["fused"]
    assert "FAILED toy, unguided, fused: RMS error" in capsys.readouterr().out

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(ModelOps, "fused", classmethod(lambda cls: cls(gelu_linear=broken)))
    assert ladder.main([*QUICK, "--rungs", "fused", "eager", "--guidance", "without", "--json", str(out)]) == 1
    assert [(r["rung"], r.get("error")) for r in json.loads(out.read_text()) if "error" in r] == [
        ("fused", "RuntimeError: no kernel image is available")
    ]


def runner(rung: str, guided: bool = True) -> rungs.Runner:
    clip = rungs.toy_clip()
    weights = rungs.random_weights(clip.config, "cpu", torch.bfloat16)
    return rungs.Runner(rung, clip, weights, guided=guided, steps=2, device="cpu", backend="eager")


def test_a_graph_that_keeps_the_first_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a CUDA graph, right and wrong; what surrounds it is as on a GPU."""
    made = runner("fused")
    made.start()
    steps = made.timesteps.clone()
    made.replay = made._step
    assert ladder.difference(*made.replayed())[1] == 0.0
    first = made.timesteps[0].clone()

    def stale() -> None:
        made.t.copy_(first)
        made._step()

    made.replay = stale
    assert ladder.difference(*made.replayed())[1] > 4 * ladder.SAME
    assert made.replay is stale and torch.equal(made.timesteps, steps) and made.dt.item() == 0.5


def test_fp8_rungs_are_the_precisions_of_the_model() -> None:
    """tests/test_precision.py is about the layers themselves."""
    made = runner("fp8")
    assert precision_of(made.model) == {"precision": "fp8", "keep": []}
    made.start()
    plain = runner("fused")
    plain.start()
    assert 0.001 < ladder.difference(made.first_velocity(), plain.first_velocity())[1] < ladder.FP8_LIMIT
    assert (
        rungs.why_not("fp8_te", "cpu") == "transformer_engine is not installed" and rungs.why_not("fp8", "cpu") is None
    )


def test_the_clips_are_those_of_the_plan() -> None:
    for name, tokens in (("240p", 15 * 405), ("512x512", 15 * 1024), ("720p", 15 * 3600)):
        clip = rungs.official_clip(name)
        assert (clip.grid.video, clip.grid.audio, clip.config.depth) == (tokens, 224, 28)
        assert counts(PlanArgs(resolution=name))["tokens"]["video"] == tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "needs a GPU; --quick"),
        (["--quick", "--device", "cpu", "--steps", "0"], "must be 1 or more"),
    ],
)
def test_unusable_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rung", "guided", "share"),
    [
        # of ten steps, seven at 800 to 200 have both halves
        ("interval", True, (7 * 2 + 3) / 20),
        # of two layers, one in every second evaluation, counted for each number of halves by itself
        ("cache", True, (4 * 2 + 3 * 2 / 2 + 2 + 1 / 2) / 20),
        ("cache", False, 0.75),
    ],
)
def test_rungs_that_approximate(rung: str, guided: bool, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the work that a row states is what is computed: counted at the blocks of the video stream."""
    monkeypatch.setattr(rungs, "compile_blocks", lambda model, backend: model)
    clip = rungs.toy_clip()
    weights = rungs.random_weights(clip.config, "cpu", torch.bfloat16)
    made = rungs.Runner(rung, clip, weights, guided=guided, steps=10, device="cpu", backend="eager")
    made.start()
    rows: list[int] = []
    for layer in made.model._layers:
        layer.video_spatial.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    made.loop(10)
    assert made.share_of_work(10) == pytest.approx(share)
    assert sum(rows) == pytest.approx(share * 10 * clip.config.depth * (2 if guided else 1))
    plain = runner("fused", guided)
    plain.start()
    assert ladder.difference(made.first_velocity(), plain.first_velocity())[1] == 0.0  # nothing is left out at first


@pytest.mark.slow
def test_compiled_and_captured_rungs(tmp_path: Path) -> None:
    """On a CPU the graph is the step itself; what surrounds it is the same."""
    out = tmp_path / "rows.json"
    arguments = [
        *QUICK,
        "--rungs",
        "eager",
        "compile",
        "graph",
        "fp8",
        "cache",
        "--guidance",
        "with",
        "--json",
        str(out),
    ]
    assert ladder.main(arguments) == 0
    rows = {r["rung"]: r for r in json.loads(out.read_text())}
    assert set(rows) == {"eager", "compile", "graph", "fp8", "cache"}
    # of three steps, 1000, 667 and 333, the last two are guided; of two layers, the last step leaves out one
    assert rows["cache"]["steps"] == 3 and rows["cache"]["share_of_work"] == round((1 + 2 + 1) / 6, 4)
    assert rows["compile"]["error_rms"] < 0.02 and rows["graph"]["error_rms"] < 0.02 < rows["fp8"]["error_rms"] * 2
