"""Two processes (gloo, FSDP2 on the CPU) against one, and checkpoints that change hands between them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from javis.train.distributed_checkpoint import finished, read_weights, why_not

from ..parallel.processes import run_ranks
from . import engine_worker
from .engine_task import FlowTask, rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one`` and ``two``: what a single process and a pair wrote; ``back``: one process went on where two stopped."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two = folder / "one", folder / "two"
    two.mkdir()
    engine_worker.flow(one / "flow")
    shutil.copytree(one / "flow" / "checkpoints" / "step_0000010", two / "from_one" / "checkpoints" / "step_0000010")
    run_ranks("tests.train.engine_worker", [str(two)], 2, folder, timeout=200)
    engine_worker.flow(one / "low", steps=4, precision="bf16", activation_checkpointing="full")
    engine_worker.flow(one / "layers", steps=4, layers=True)
    engine_worker.toy(one / "skipped")
    shutil.copytree(two / "flow" / "checkpoints" / "step_0000010", one / "back" / "checkpoints" / "step_0000010")
    engine_worker.flow(one / "back")
    return folder


def close(a: Path, b: Path, tolerance: float, start: int = 0) -> None:
    for x, y in zip(rows(a)[start:], rows(b), strict=True):
        assert x == pytest.approx(y, rel=tolerance), (x, y)


def test_two_processes_compute_what_one_does(runs: Path) -> None:
    """20 steps with accumulation, clipping, warm-up and decay: losses, norms of the gradient, weights, averages."""
    one, two = runs / "one" / "flow", runs / "two" / "flow"
    assert len(rows(two)) == 20
    close(one, two, 2e-5)
    begun = {name: x.detach() for name, x in FlowTask().module.named_parameters()}

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        # A softmax does not see what is added to all keys: the gradient of that bias is nothing but rounding, of which
        # Adam makes whole steps.
        keys = {name: len(x) // 2 if name.endswith("kv.bias") else 0 for name, x in begun.items()}
        return sum(float((a[name] - b[name])[keys[name] :].double().square().sum()) for name in begun) ** 0.5

    for average in (False, True):
        a, b = read_weights(one, average=average), read_weights(two, average=average)
        assert a.keys() == b.keys() == begun.keys()
        assert distance(a, b) < 1e-5 * distance(a, begun)
    assert rows(two)[-1]["loss"] < 0.9 * rows(two)[0]["loss"]  # it trains at all


def test_weights_and_moments_are_divided(runs: Path) -> None:
    """Each process wrote about half of what one process writes alone."""
    alone = {p.name: p.stat().st_size for p in (runs / "one/flow/checkpoints/step_0000020").glob("*.safetensors")}
    shared = {p.name: p.stat().st_size for p in (runs / "two/flow/checkpoints/step_0000020").glob("*.safetensors")}
    assert len(shared) == 2 * len(alone)
    for name, size in alone.items():
        for rank in ("00001", "00002"):
            assert shared[name.replace("shard-00001", f"shard-{rank}")] < 0.75 * size


def test_a_checkpoint_of_two_goes_on_in_one_and_the_other_way(runs: Path) -> None:
    close(runs / "two/flow", runs / "one/back", 2e-5, start=10)
    close(runs / "one/flow", runs / "two/from_one", 2e-5, start=10)
    state = json.loads((runs / "two/from_one/checkpoints/step_0000020/state.json").read_text())
    assert len(state["ranks"]) == 2


def test_replicas_compute_the_same(runs: Path) -> None:
    for x, y in zip(rows(runs / "one/flow")[:4], rows(runs / "two/hybrid"), strict=True):
        assert x == pytest.approx(y, rel=2e-5)


def test_layers_called_whole_and_computed_again(runs: Path) -> None:
    close(runs / "one/layers", runs / "two/layers", 2e-5)
    for x, y in zip(rows(runs / "one/flow")[:4], rows(runs / "one/layers"), strict=True):
        assert x == pytest.approx(y, rel=2e-5)


def test_bfloat16_with_activations_computed_again(runs: Path) -> None:
    close(runs / "one/low", runs / "two/low", 2e-2)
    assert rows(runs / "one/low")[0]["loss"] == pytest.approx(rows(runs / "one/flow")[0]["loss"], rel=3e-2)
    assert all(x.dtype == torch.float32 for x in read_weights(runs / "two/low").values())


def test_a_full_disk_of_one_rank_is_seen_by_all(runs: Path) -> None:
    names = [path.name for path in finished(runs / "two/full/checkpoints")]
    assert names == ["step_0000012", "step_0000004"]
    assert why_not(runs / "two/full/checkpoints/step_0000012") is None
    assert not list((runs / "two/full/checkpoints").glob("*.partial"))
    log = (runs / "rank1.log").read_text()
    assert "step_0000008 could not be written: OSError on rank 1: [Errno 28] No space left" in log


def test_a_nonfinite_loss_of_one_rank_is_skipped_by_all(runs: Path) -> None:
    assert [row.get("skipped") for row in rows(runs / "two/skipped")] == [0.0] * 3 + [1.0] * 9
    assert "loss" not in rows(runs / "two/skipped")[3]
    for one, two in zip(rows(runs / "one/skipped")[:3], rows(runs / "two/skipped"), strict=False):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-5)  # all began with the weights of rank 0
    assert all(x.isfinite().all() for x in read_weights(runs / "two/skipped").values())


def test_both_stop_after_some_in_a_row_each_with_its_batch(runs: Path) -> None:
    for rank in (0, 1):
        assert "3 steps in a row, up to step 8" in (runs / "two" / f"stopped-{rank}.txt").read_text()
        assert (runs / "two/stopped/nonfinite" / f"step_0000008_rank_{rank}.safetensors").is_file()
