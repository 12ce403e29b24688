"""The measures of synchrony against planted truth: closed forms of the bookkeeping, and a small run of the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from javis.cli import main
from javis.data.negatives_world import world_clip
from javis.eval.sync_score import sync_score
from javis.eval.validate import Pair, Stream, rank_clips, ranking_report, scenes_of, scores, verdicts
from javis.eval.validate_offset import Shifted, is_ambiguous, offset_report, shift_clips

SEED = 5_500_000  # neither the seeds of development nor those of the figures in docs/sync.md


def test_a_verdict_is_right_equal_or_wrong() -> None:
    whole = {"a": 0.5, "b": 0.5, "c": 0.5, "d": float("nan")}
    found = verdicts(whole, {"a": 0.4, "b": 0.5, "c": 0.6, "d": 0.1})
    assert found == {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.5}


def test_the_report_in_closed_form() -> None:
    pairs = [
        Pair(0, "cut", 0.1, {"s": 1.0}),
        Pair(0, "cut", 1.0, {"s": 0.0}),
        Pair(1, "cut", 1.0, {"s": 1.0}),
        Pair(1, "hum", 1.0, {"s": 0.5}),
        Pair(1, "late", None, {"s": 0.0}),
    ]
    report = ranking_report(pairs, 2)
    assert (report["pairs"], report["twin_pairs"]) == (4, 1)
    found = report["scores"]["s"]
    assert found["all"]["value"] == 0.625 and found["twins"]["value"] == 0.0
    assert (found["all"]["low"], found["all"]["high"]) == (0.5, 0.75), "one clip or the other twice"
    assert found["kinds"] == {"cut": 0.6667, "hum": 0.5} and found["levels"] == {"0.1": 1.0, "1": 0.5}
    assert found["cells"] == {"cut 0.1": 1.0, "cut 1": 0.5, "hum 1": 0.5} and found["twin_kinds"] == {"late": 0.0}


def test_scores_of_the_parts_are_those_of_the_clip() -> None:
    clip = world_clip(scenes_of(1, SEED)[0])
    stream = Stream(clip)
    found = scores(stream, stream)
    assert found["sync_score"] == pytest.approx(sync_score(clip.video, clip.waveform, clip.fps, clip.rate), abs=1e-9)
    assert found["event_agreement"] > 0.5 and 0 <= found["av_align_corrected"] <= 1
    assert all(np.isfinite(value) for value in found.values())


def test_real_clips_rank_above_what_is_clearly_damaged() -> None:
    kinds = ("audio_shift", "audio_drop", "audio_extra", "video_freeze", "audio_noise", "video_noise")
    pairs = rank_clips(scenes_of(3, SEED), seed=SEED, levels=(0.3,), kinds=kinds, twins=False)
    assert len(pairs) == 18 and {pair.kind for pair in pairs} == set(kinds)
    report = ranking_report(pairs, 3)["scores"]
    assert report["sync_score"]["all"]["value"] >= 0.95
    again = rank_clips(scenes_of(3, SEED), seed=SEED, levels=(0.3,), kinds=kinds[:1], twins=False)
    assert again == [pair for pair in pairs if pair.kind == kinds[0]], "same seed, same damage, whatever else is made"


def test_what_exact_times_leave_open() -> None:
    uneven = [0.3, 0.71, 1.5]
    assert not any(is_ambiguous(uneven, shift, 2.0) for shift in (-0.25, 0.0, 0.2, 0.45))
    assert is_ambiguous(uneven, 1.8, 2.0), "no sound is left"
    assert is_ambiguous([0.25, 0.96, 1.67], -0.4, 2.0), "a pendulum: 0.31 s late explains what is left as well"
    assert not is_ambiguous([0.25, 0.96, 1.67], 0.1, 2.0)
    assert is_ambiguous([0.6, 1.7], 0.5, 2.0), "one sound of two is left at 1.1 s: 0.6 s early is as good"


def test_shifts_are_found_and_the_report_counts_them() -> None:
    shifted = shift_clips(scenes_of(2, SEED), seed=SEED)
    assert len(shifted) == 30 and min(s.planted for s in shifted) == -0.5 and max(s.planted for s in shifted) == 0.5
    report = offset_report(shifted, 2)
    assert report["shifts"] == 30 and report["clear"]["shifts"] == 30 - report["ambiguous"]
    assert report["clear"]["found"]["value"] >= 0.95 and report["clear"]["median_abs_ms"] < 10
    made = [
        Shifted(0, "knocks", 0.1, 0.109, 0.2, 0.5, False),
        Shifted(0, "knocks", 0.1, 0.111, None, 0.05, False),
        Shifted(1, "swings", 0.1, None, None, 0.0, True),
        Shifted(1, "swings", -0.1, 0.6, None, 0.3, True),
    ]
    report = offset_report(made, 2)
    assert report["all"]["found"]["value"] == 0.25 and report["clear"]["found"]["value"] == 0.5
    assert report["all"]["gross"] == 2 and report["clear"]["gross"] == 0 and report["clear"]["mean_ms"] == 10.0
    assert report["confident"]["share"] == 0.5 and report["confident"]["found"]["value"] == 0.5
    assert report["energy_alone"]["found"]["value"] == 0.0 and report["energy_alone"]["gross"] == 2


def test_the_command_and_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("javis.eval.validate.LEVELS", (1.0,))
    rows, file = tmp_path / "rows.jsonl", tmp_path / "r.json"
    arguments = ["eval", "validate", "--count", "2", "--seed", str(SEED), "--seconds", "1"]
    assert main([*arguments, "--json", str(file), "--append", str(rows)]) == 0
    report, row = json.loads(file.read_text()), json.loads(rows.read_text())
    assert row["kind"] == "eval_validate" and row["commit"] and report["ranking"] == row["ranking"]
    assert "sync_score" in capsys.readouterr().out
    for bad in (["--count", "1"], ["--seed", "-1"], ["--json", str(tmp_path)]):
        assert main(["eval", "validate", *bad]) == 2
