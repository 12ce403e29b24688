"""Nothing lost: killed at random moments, left behind by a parent, asked to stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from javis.train.distributed_checkpoint import finished, read_weights

from ..parallel.processes import Process, wait_all
from .engine_task import rows
from .killed import STEPS


@pytest.mark.slow
def test_killed_ten_times_the_losses_are_those_of_a_run_that_was_not(tmp_path: Path) -> None:
    """SIGKILL; the curve, weights and averages are bit-identical."""
    process = Process(["-m", "tests.train.killed", str(tmp_path), "10"], tmp_path / "out.log", {})
    assert wait_all([process], 100) == [0], process.output[-3000:]
    places = json.loads((tmp_path / "places.json").read_text())
    assert len(places) == 10 and 0 < places[-1] < STEPS and len(set(places)) > 4, places
    assert len(rows(tmp_path / "whole")) == STEPS
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    a, b = (read_weights(tmp_path / name) for name in ("killed", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == [path.name for path in reversed(finished(tmp_path / "killed" / "checkpoints"))]
