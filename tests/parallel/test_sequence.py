"""One clip over several processes equals one clip in one process: four ranks with gloo, in groups of 2 and 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from javis.kernels.testing import assert_within_budget
from tests.parallel.cases import CASES, REFUSED, SEEDS
from tests.parallel.processes import run_ranks

WORLD = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.parallel.worker", [str(folder)], WORLD, folder, timeout=180)
    return folder


def read(results: Path, name: str) -> list[Any]:
    """What each rank has written."""
    return [torch.load(results / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_together_equals_alone(results: Path, name: str) -> None:
    case = CASES[name]
    expected = case.run(case.model())
    exact = case.run(case.model().double()) if case.dtype is torch.bfloat16 else expected
    for found in read(results, name):
        for part in ("together", "alone") if case.alone else ("together",):
            for actual, wanted, truth in zip(found[part], expected, exact, strict=True):
                assert wanted.abs().max() > 0.05  # the comparison is about something
                assert actual.dtype == wanted.dtype
                if case.dtype is torch.bfloat16:
                    assert_within_budget(name, actual, truth, wanted)
                else:
                    tolerance = case.tolerance if part == "together" else 0
                    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def test_clips_in_turn_and_then_forgotten(results: Path) -> None:
    case = CASES["cfg and seq"]
    model = case.model()
    for found in read(results, "interleaved"):
        for turn, seed in enumerate(SEEDS):
            noisy, told = case.inputs(seed)
            with torch.no_grad():
                expected = model.denoise(**noisy, condition=model.condition(**told))
            for actual, wanted in zip(found[str(turn)], expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
        assert found["kept"] is False, "the keys and values of a clip go with it"


def test_what_cannot_be_shared_is_refused_by_every_rank(results: Path) -> None:
    for said in read(results, "refusals"):
        assert "4 processes cannot share 3 frames x 6 places of video tokens; use at most 3" in said["too few frames"]
        assert "4 processes cannot share 5 frames x 3 places of video tokens; use at most 3" in said["too few places"]
        assert "4 processes cannot share 3 frames x 5 places of audio tokens; use at most 3" in said["too little audio"]
        assert "2 processes share the halves of guidance, but there is 1 sample" in said["one sample"]
        assert all(said[name].startswith("UsageError: ") for name in REFUSED)
        assert "do not fit the conditioning" in said["other sizes"]
        # Hooks that went on exchanging would hang or spoil whoever uses the model by itself after that.
        assert said["bad mask"].startswith("0 streams left: a condition mask must be")
