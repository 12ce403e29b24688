"""The benchmark from the prompt to the file, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks/end_to_end.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks import end_to_end  # noqa: E402
from benchmarks.tables import end_to_end_sections  # noqa: E402
from javis import JavisPipeline  # noqa: E402
from javis.clip_stages import STAGES  # noqa: E402


def test_every_stage_of_every_rung_is_timed_and_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(end_to_end.bench, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    found = tmp_path / "rows.json"
    arguments = ["--size", "toy", "--device", "cpu", "--dry-run", "--steps", "3", "--repeats", "2"]
    arguments += ["--json", str(found)]
    # No denoising is that short, so two of the three steps are not measured.
    assert end_to_end.main([*arguments, "--sample-seconds", "1e-9", "--results", str(tmp_path)]) == 0
    rows = json.loads(found.read_text())["rows"]
    assert [row["rung"] for row in rows] == list(end_to_end.RUNGS)
    for row in rows:
        assert list(row["stages"]) == list(STAGES) and row["random_weights"] is True
        assert (row["measured_steps"], row["multiplied_by"], row["samples"]) == (1, 3, 2)
        assert (row["frames"], row["guidance"]) == (17, True)
        for stage, facts in row["stages"].items():
            assert 0 < facts["s_min"] <= facts["s_p50"] <= row["s_p50"] * 1.5, stage
            planned = row["rung"] == "fused" and stage != "mux"
            assert (facts["planned_gb"] is not None) == (facts["roofline_s"] is not None) == planned
    (written,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line)["rung"] for line in written.read_text().splitlines()] == list(end_to_end.RUNGS)
    printed = capsys.readouterr().out
    assert "64x64, 3 steps, upstream" in printed and "1 steps x 3" in printed
    page = end_to_end_sections(rows)
    assert page.count("| toy | 64x64 | 3 |") == len(end_to_end.RUNGS) and "video_decode s" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they may run")
def test_rungs_of_a_gpu_are_left_out_or_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    class Only(end_to_end.Table):
        def run(self, speeds: object, end: float) -> None:
            made.extend(self.models)

        def rows(self, *_: object) -> list[end_to_end.Row]:
            return []

    monkeypatch.setattr(end_to_end, "Table", Only)
    arguments = ["--size", "toy", "--device", "cpu", "--steps", "2"]
    found = tmp_path / "rows.json"
    assert end_to_end.main([*arguments, "--json", str(found)]) == 1  # nothing was timed
    assert made == ["upstream", "eager", "fused"]
    assert set(json.loads(found.read_text())["left_out"]) == {"graph", "fp8"}
    said = capsys.readouterr()
    assert "rung graph needs a CUDA device, the model is on cpu" in said.out and "rung fp8 needs" in said.out
    made.clear()
    for rung in ("graph", "fp8"):
        assert end_to_end.main([*arguments, "--rungs", "fused", rung]) == 2 and not made
        assert f"rung {rung} needs a CUDA device" in capsys.readouterr().err
    assert end_to_end.main([*arguments, "--dry-run", "--rungs", "fp8", "upstream"]) == 1
    assert made == ["upstream", "fp8"]  # the baseline first


def test_rungs_make_the_same_clip_and_the_first_conditions_in_every_step() -> None:
    pipe = JavisPipeline.with_random_weights("toy", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    clips, calls = {}, []
    for rung in end_to_end.RUNGS:
        model = end_to_end.model_of(rung, pipe, dry=True)
        if rung == "upstream":
            inner = model.model.condition
            model.model.condition = lambda **told: (calls.append(1), inner(**told))[1]  # noqa: B023
        own, pipe.model = pipe.model, model
        pipe.denoiser = end_to_end.denoiser_of(rung, model, dry=True)
        # Without guidance: in a batch of two the official computation lets the halves see each other's priors.
        clips[rung] = pipe("a dog barks", steps=3, seed=1, guidance=1.0)
        pipe.model, pipe.denoiser = own, None
    assert len(calls) == 1 + 3
    for rung, most in (("eager", 1), ("fused", 1), ("graph", 1), ("fp8", 8)):
        difference = torch.tensor(clips[rung].video).float() - torch.tensor(clips["upstream"].video).float()
        assert difference.abs().mean() < most, rung
    assert (clips["graph"].video == clips["fused"].video).all() and (clips["fp8"].video != clips["fused"].video).any()
