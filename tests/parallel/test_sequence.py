"""One clip over several processes equals one clip in one process: four ranks with gloo, in groups of 2 and 4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.cases import CASES, REFUSED
from tests.parallel.processes import run_ranks

WORLD = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.parallel.worker", [str(folder)], WORLD, folder, timeout=180)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_together_equals_alone(results: Path, name: str) -> None:
    case = CASES[name]
    expected = case.run(case.model())
    for rank in range(WORLD):
        found = torch.load(results / f"{name}-{rank}.pt", weights_only=True)
        for part in ("together", "alone") if case.alone else ("together",):
            for actual, wanted in zip(found[part], expected, strict=True):
                assert wanted.abs().max() > 0.05  # the comparison is about something
                assert actual.dtype == wanted.dtype
                tolerance = case.tolerance if part == "together" else 0
                torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance, msg=f"{part}, rank {rank}")


def test_what_cannot_be_shared_is_refused_by_every_rank(results: Path) -> None:
    for rank in range(WORLD):
        said = torch.load(results / f"refusals-{rank}.pt", weights_only=True)
        assert "4 processes cannot share 3 frames x 6 places of video tokens; use at most 3" in said["too few frames"]
        assert "4 processes cannot share 5 frames x 3 places of video tokens; use at most 3" in said["too few places"]
        assert "4 processes cannot share 3 frames x 5 places of audio tokens; use at most 3" in said["too little audio"]
        assert "2 processes share the halves of guidance, but there is 1 sample" in said["one sample"]
        assert all(said[name].startswith("UsageError: ") for name in REFUSED)
        assert "do not fit the conditioning" in said["other sizes"]
