"""benchmarks/ladder.py at toy size: rungs compute the same, rows say what was measured, a wrong rung is not timed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks/ladder.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks import fp8, ladder, rungs  # noqa: E402
from javis.model.ops import ModelOps  # noqa: E402
from javis.plan import PlanArgs, counts  # noqa: E402

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
        assert row["tflop_per_s"] == pytest.approx(row["tflop"] / row["s_p50"], rel=1e-2, abs=1e-4)
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


def test_fp8_products_are_near_and_norms_feed_them() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(96, 32).requires_grad_(False)
    x = 3 * torch.randn(2, 5, 96, generator=generator)
    x[:, 1] *= 1e5  # every row needs a scale of its own
    expected, actual = linear(x), fp8.Fp8Linear(linear.bfloat16())(x.bfloat16()).float()
    error = (actual - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
    assert error.max() < 0.06  # half a unit of three bits of mantissa, twice, averaged over 96 products
    with pytest.raises(ValueError, match=r"16 divides, got \(32, 100\)"):
        fp8.Fp8Linear(nn.Linear(100, 32))
    made = runner("fp8")
    layer = made.model._layers[0]
    assert isinstance(layer.video_spatial.attn.qkv, fp8.Fp8Linear) and layer.video_prior is not None
    assert isinstance(layer.video_prior.mlp.fc1, fp8.Fp8Linear) and isinstance(
        layer.video_prior.spatial.attn.q, nn.Linear
    )
    seen = []
    layer.video_spatial.attn.qkv.register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
    for block in fp8.blocks(layer).values():
        block._compiled_call_impl = None  # hooks of parts do not run in compiled code
    made.start()
    assert set(seen) == {fp8.Quantised}


def test_transformer_engine_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of the same interface: the layers get the weights, and the result is that of the model."""
    entered = []

    class Autocast:
        def __init__(self, *, enabled: bool) -> None:
            entered.append(enabled)

        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    def linear(
        size_in: int, size_out: int, *, bias: bool, params_dtype: torch.dtype, device: torch.device
    ) -> nn.Linear:
        return nn.Linear(size_in, size_out, bias=bias, dtype=params_dtype, device=device)

    te = types.ModuleType("transformer_engine.pytorch")
    te.Linear, te.fp8_autocast = linear, Autocast  # type: ignore[attr-defined]
    package = types.ModuleType("transformer_engine")
    package.pytorch = te  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)
    found = runner("fp8_te")
    found.start()
    plain = runner("fused")
    plain.start()
    assert entered and set(entered) == {True}
    assert ladder.difference(found.first_velocity(), plain.first_velocity())[1] < 0.02


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


@pytest.mark.slow
def test_compiled_and_captured_rungs(tmp_path: Path) -> None:
    """On a CPU the graph is the step itself; what surrounds it is the same."""
    out = tmp_path / "rows.json"
    arguments = [*QUICK, "--rungs", "eager", "compile", "graph", "fp8", "--guidance", "with", "--json", str(out)]
    assert ladder.main(arguments) == 0
    rows = {r["rung"]: r for r in json.loads(out.read_text())}
    assert set(rows) == {"eager", "compile", "graph", "fp8"}
    assert rows["compile"]["error_rms"] < 0.02 and rows["graph"]["error_rms"] < 0.02 < rows["fp8"]["error_rms"] * 2
