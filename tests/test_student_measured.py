"""Measuring a checkpoint with a student: fingerprints of its variants, and that the one that is named is measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from javis import JavisPipeline
from javis.eval.steps_points import variant_fingerprint
from javis.eval.world_report import run
from javis.train.export import export_student

from .test_student import CHANGED, SETTINGS, both, pipe, teacher, trained

__all__ = ["both", "pipe", "teacher", "trained"]  # fixtures


def test_fingerprints_of_the_variants(teacher: Path, both: Path, trained: dict[str, Tensor], tmp_path: Path) -> None:
    """Another student leaves the teacher's as it is, another teacher does not."""
    other = export_student(
        teacher, trained | {CHANGED[0]: 2 * trained[CHANGED[0]]}, {**SETTINGS, "steps": 2}, tmp_path / "other"
    )
    state = load_file(both / "model.safetensors")
    (tmp_path / "changed").mkdir()
    shutil.copy(both / "config.json", tmp_path / "changed" / "config.json")
    name = "model.video_final.linear.bias"
    save_file(state | {name: state[name] + 1}, tmp_path / "changed" / "model.safetensors")
    marks = {
        variant: [variant_fingerprint(str(f), variant) for f in (both, other, tmp_path / "changed")]
        for variant in ("teacher", "student", "codec")
    }
    assert marks["teacher"][0] == marks["teacher"][1] != marks["teacher"][2]
    assert marks["codec"] == marks["teacher"]
    assert len(set(marks["student"])) == 3
    assert variant_fingerprint(str(teacher), "teacher") == marks["teacher"][0]
    assert variant_fingerprint(str(tmp_path / "nothing"), "teacher") is None


@pytest.mark.parametrize(("given", "expected"), [({}, "student"), ({"variant": "teacher", "steps": 2}, "teacher")])
def test_eval_world_measures_the_variant_that_it_names(
    pipe: JavisPipeline, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], expected: str
) -> None:
    made, generate = [], JavisPipeline.__call__

    def spy(self: JavisPipeline, *args: Any, **kwargs: Any) -> Any:
        made.append(generate(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(JavisPipeline, "__call__", spy)
    report = run(pipe, count=1, ceiling=False, **given)
    assert {batch.choice.variant for batch in made} == {expected} == {report["variant"]}
    assert {batch.steps for batch in made} == {report["steps"]}
    assert {batch.audio_guidance for batch in made} == {report["audio_guidance"]}
