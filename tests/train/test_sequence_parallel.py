"""Training of clips whose tokens several processes share, against one process: gradients and whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from javis.kernels.ops.bidirectional_attention.reference import bidirectional_attention_ref
from javis.kernels.testing import assert_within_budget
from javis.parallel.collectives import split_sizes
from javis.train.distributed_checkpoint import read_weights

from ..parallel.processes import run_ranks
from . import sequence_worker
from .engine_task import rows
from .sequence_worker import MODELS, attention_inputs, random, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pair of processes wrote, and in ``one`` a single one."""
    folder = tmp_path_factory.mktemp("sequence")
    one = folder / "one"
    train(one / "joint")
    for name in ("from_one", "divided"):
        shutil.copytree(one / "joint/checkpoints/step_0000010", folder / name / "checkpoints/step_0000010")
    run_ranks("tests.train.sequence_worker", [str(folder)], 2, folder, timeout=240)
    train(one / "audio", stage="audio", steps=4)
    train(one / "low", steps=4, precision="bf16", activation_checkpointing="selective")
    shutil.copytree(folder / "joint/checkpoints/step_0000010", one / "back/checkpoints/step_0000010")
    train(one / "back")
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("square")
    run_ranks("tests.train.sequence_worker", [str(folder)], 4, folder, timeout=240)
    return folder


def check_exchanges(folder: Path, world: int) -> None:
    found = [torch.load(folder / f"exchanges-{rank}.pt", weights_only=True) for rank in range(world)]
    for name in ("exchange", "gather", "attention"):
        for told in found:
            by_gradient, by_difference = told[name]
            assert abs(by_difference) > 0.1 and by_gradient == pytest.approx(by_difference, rel=1e-7), name
    total = sum(random(2, 5, 3, seed=40 + rank) for rank in range(world))
    assert torch.equal(torch.cat([told["scatter_sum"] for told in found], 1), total)
    # The attention against the attention of one process, in float64 on the same rounded inputs.
    *inputs, to_video, to_audio = attention_inputs()

    def one(rounded: torch.dtype, computed: torch.dtype) -> tuple[torch.Tensor, ...]:
        given = [x.to(rounded).to(computed).requires_grad_() for x in inputs]
        results = bidirectional_attention_ref(*given, 2)
        loss = sum((w * x).sum() for w, x in zip((to_video, to_audio), results, strict=True))
        return torch.autograd.grad(loss, given)  # type: ignore[arg-type]

    for name, dtype in (("reference", torch.float64), ("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        exact, plain = one(dtype, torch.float64), one(dtype, dtype)
        for i, length in enumerate(x.shape[1] for x in inputs):
            assert [told[name][i].shape[1] for told in found] == split_sizes(length, world)
            made = torch.cat([told[name][i] for told in found], 1)
            if dtype is torch.float64:
                torch.testing.assert_close(made, exact[i], rtol=1e-12, atol=1e-12)
            else:
                assert_within_budget(f"{name} {i}", made.to(dtype), exact[i], plain[i])


def check_gradients(folder: Path) -> None:
    found = torch.load(folder / "gradients.pt", weights_only=True)
    cases = [(name, "joint") for name in MODELS] + [("clock", "audio")]
    assert found.keys() == {f"{name} {stage}" for name, stage in cases}
    for name, stage in cases:
        wanted = sequence_worker.gradients(name, stage, None)
        assert found[f"{name} {stage}"].keys() == wanted.keys() and len(wanted) > 30
        for parameter, gradient in wanted.items():
            error = (found[f"{name} {stage}"][parameter] - gradient).abs().max()
            # A velocity made of a predicted sample is float32 whatever the model is.
            tolerance = 1e-5 if name == "sample prediction" else 1e-10
            assert error <= tolerance * gradient.abs().max(), (name, stage, parameter)


def check_rows(a: Path, b: Path, tolerance: float = 2e-5, start: int = 0, names: tuple[str, ...] = ()) -> None:
    """Rows of the log; ``names``: these columns only."""

    def chosen(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if not names or name in names}

    for x, y in zip(rows(a)[start:], rows(b), strict=True):
        assert chosen(x) == pytest.approx(chosen(y), rel=tolerance)


def test_gradients_of_the_exchanges(two: Path) -> None:
    """Against differences in float64, where every rank has other data and none divides; attention on each backend."""
    check_exchanges(two, 2)


def test_gradients_of_every_parameter(two: Path) -> None:
    """With condition masks and dropped conditions, for all forms of the priors; float64."""
    check_gradients(two)


def test_two_that_share_clips_train_as_one_does(two: Path) -> None:
    """20 steps with masks, dropping, accumulation, clipping, warm-up, decay: losses, norms, weights, averages."""
    one = two / "one"
    assert len(rows(two / "joint")) == 20
    check_rows(one / "joint", two / "joint")
    begun = dict(sequence_worker.model_of("clock").named_parameters())
    for average in (False, True):
        a, b = (read_weights(path / "joint", average=average) for path in (one, two))
        assert a.keys() == b.keys()
        moved = sum(float((a[name] - begun[name[6:]].detach()).square().sum()) for name in a) ** 0.5
        apart = sum(float((a[name] - b[name]).square().sum()) for name in a if not name.endswith("kv.bias")) ** 0.5
        assert moved > 0 and apart < 1e-4 * moved
    check_rows(one / "audio", two / "audio")


def test_activations_computed_again_are_exchanged_again(two: Path) -> None:
    for x, y in zip(rows(two / "joint")[:4], rows(two / "again"), strict=True):
        assert x == pytest.approx(y, rel=2e-5)
    check_rows(two / "one/low", two / "low", 2e-2)


def test_checkpoints_change_hands(two: Path) -> None:
    """Between one process, two that share clips, and two with clips of their own."""
    check_rows(two / "one/joint", two / "from_one", start=10)
    check_rows(two / "joint", two / "one/back", start=10)
    check_rows(two / "one/joint", two / "divided", start=10, names=("loss", "norm", "lr"))
    state = json.loads((two / "joint/checkpoints/step_0000020/state.json").read_text())
    assert state["sequence_parallel"] == 2 and state["ranks"][0]["source"] == {"number": 40}
    assert state["ranks"][1]["source"] == {}


def test_four_as_two_by_two(two: Path, four: Path) -> None:
    check_exchanges(four, 4)
    check_gradients(four)
    check_rows(two / "one/joint", four / "square", names=("loss", "norm", "lr"))
