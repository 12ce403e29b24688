"""A checkpoint with a student: its fingerprints, which variant is measured, what stays the teacher's to fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from javis import JavisPipeline
from javis.eval.steps_points import variant_fingerprint
from javis.eval.world_report import run
from javis.train.export import export_student

from .test_student import CHANGED, SETTINGS, both, model_state, pipe, teacher, trained

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


def test_what_changed_least_for_its_bytes_stays_where_both_take_too_much(teacher: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    state = model_state(teacher)
    # Each tensor changes by a share of its own that is known, between 0.01 and 1.
    drawn = torch.linspace(0.01, 1, len(state))[torch.randperm(len(state), generator=generator)]
    shares = dict(zip(sorted(state), drawn.tolist(), strict=True))
    changed = {name: value * (1 + shares[name]) for name, value in state.items()}
    every = export_student(teacher, changed, SETTINGS, tmp_path / "every", limit=None)
    whole = sum(path.stat().st_size for path in every.iterdir())
    limit = whole - sum(value.numel() * 2 for value in state.values()) // 3
    folder = export_student(teacher, changed, SETTINGS, tmp_path / "fits", limit=limit, revert=True)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
    stored = load_file(folder / "model.safetensors")
    kept = {name.removeprefix("student.") for name in stored if name.startswith("student.")}
    reverted = json.loads((folder / "config.json").read_text())["student"]["reverted"]
    assert kept and reverted and set(reverted) | kept == set(state) and not set(reverted) & kept
    a_byte = {name: shares[name] ** 2 / state[name].numel() for name in state}
    assert max(a_byte[name] for name in reverted) < min(a_byte[name] for name in kept)
    pipe = JavisPipeline.from_pretrained(folder)
    mine, theirs = dict(pipe.model_of("student").named_parameters()), dict(pipe.model.named_parameters())
    assert all(torch.equal(mine[name], theirs[name]) for name in reverted)
