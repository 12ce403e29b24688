"""Which of a student's parameters stay the teacher's where both together are too large, in an order that is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from javis import JavisPipeline
from javis.errors import UsageError
from javis.train.export import export_student

from ..tiny import write_tiny_checkpoint

SETTINGS = {"steps": 4, "guidance": 1.0}


def test_parameters_are_reverted_in_the_given_order(tmp_path: Path) -> None:
    teacher = write_tiny_checkpoint(tmp_path / "teacher")
    held = JavisPipeline.from_pretrained(teacher).model.state_dict()
    state = {name: value * 1.5 + 0.01 for name, value in held.items()}
    whole = export_student(teacher, state, SETTINGS, tmp_path / "whole", limit=None)
    size = sum(path.stat().st_size for path in whole.iterdir())
    order = ["not.there", *sorted(state, reverse=True)]  # changed by equal shares, so no other reason for this order
    folder = export_student(teacher, state, SETTINGS, tmp_path / "fits", limit=size - 20_000, revert=order)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= size - 20_000
    reverted = json.loads((folder / "config.json").read_text())["student"]["reverted"]
    assert 0 < len(reverted) < len(state) and reverted == order[1 : 1 + len(reverted)]
    stored = {name.removeprefix("student.") for name in load_file(folder / "model.safetensors")}
    assert not stored & set(reverted)
    student = JavisPipeline.from_pretrained(folder).model_of("student").state_dict()
    assert all(torch.equal(student[name], held[name].half().float()) for name in reverted)
    with pytest.raises(UsageError, match="without the parameters to revert it is more than the limit allows"):
        export_student(teacher, state, SETTINGS, tmp_path / "no", limit=size - 20_000, revert=order[:2])
    assert not (tmp_path / "no").exists()
