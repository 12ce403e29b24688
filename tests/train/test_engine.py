"""The engine in one process: against a loop written out by hand, and what it does when things go wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from javis.errors import FailedError, UsageError
from javis.train.distributed_checkpoint import finished, read_weights, step_folder
from javis.train.engine import EngineConfig, Trainer, learning_rate

from .engine_runs import Watcher, interrupted, settings, train
from .engine_task import FlowSource, FlowTask, ToySource, ToyTask, rows

# -- the step ---------------------------------------------------------------------------------------------------------


def test_it_is_adamw_with_clipping_accumulation_and_average(tmp_path: Path) -> None:
    """Against the same written out: AdamW by its formula in float64, on gradients of the whole batch."""
    c = settings(tmp_path, steps=6, accumulation=2, clip_gradient=0.5, weight_decay=0.1, warmup=3, schedule="linear",
                 decay=0.5, save_every=0)  # fmt: skip
    task = ToyTask()
    model = ToyTask().module.double()
    names = ["first.weight", "first.bias", "last.weight", "last.bias"]
    weights = {name: model.get_parameter(name) for name in names}
    moments = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in weights.items()}
    average = {name: x.detach().clone() for name, x in weights.items()}
    Trainer(task, ToySource(), c).run()
    source, logged = ToySource(), rows(tmp_path)
    for step in range(6):
        batches = [source.next(), source.next()]
        loss = sum(model({"x": b["x"].double(), "y": b["y"].double()})["loss"] for b in batches) / 2
        gradients = dict(zip(names, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        rate = 1e-2 * min(1, (step + 1) / 3) * (1 if step < 3 else (6 - step) / 3)
        assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged[step]["norm"] == pytest.approx(norm, rel=1e-5)
        assert logged[step]["lr"] == pytest.approx(rate)
        decay = min(0.9, (2 + step) / (11 + step))
        with torch.no_grad():
            for name, x in weights.items():
                g, (m, v) = gradients[name] * min(1, 0.5 / norm), moments[name]
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                x.mul_(1 - rate * (0.1 if x.ndim > 1 else 0))
                x.sub_(rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
                average[name].lerp_(x, 1 - decay)
    for average_wanted, wanted in ((False, weights), (True, average)):
        found = read_weights(tmp_path, average=average_wanted)
        assert set(found) == {*names, "seen", "frozen"}
        assert int(found["seen"]) == 12
        for name in names:
            torch.testing.assert_close(found[name].double(), wanted[name].detach(), rtol=2e-5, atol=2e-6)


def test_learning_rate_schedules() -> None:
    c = EngineConfig(steps=100, learning_rate=2.0, warmup=10, schedule="cosine", decay=0.5)
    assert [learning_rate(s, c) for s in (0, 4, 9, 30, 50)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    assert learning_rate(75, c) == pytest.approx(1.0)
    assert learning_rate(99, c) == pytest.approx(2 * math.sin(math.pi / 100) ** 2)
    assert learning_rate(99, EngineConfig(steps=100, learning_rate=2.0)) == 2.0


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activations_computed_again_change_nothing(tmp_path: Path, how: str) -> None:
    for name, kind in (("plain", "none"), ("again", how)):
        task = FlowTask()
        before = {n: p.detach().clone() for n, p in task.module.named_parameters()}
        calls = []
        task.module.model.layers[0].video_temporal.attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        train(tmp_path / name, task, FlowSource(), steps=3, activation_checkpointing=kind, save_every=0)
        assert len(calls) == (3 if kind == "none" else 6)
        assert "forward" not in vars(task.module.model.layers[0].video_temporal)
        moved = {n for n, p in task.module.named_parameters() if not torch.equal(p, before[n])}
        assert not any("video_spatial" in n for n in moved)
        assert any("video_temporal" in n for n in moved)
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "again"), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_gradients_are_reduced_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches a step has."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    calls, reduce = [], _fsdp_param_group.foreach_reduce
    monkeypatch.setattr(_fsdp_param_group, "foreach_reduce", lambda *a, **k: (calls.append(1), reduce(*a, **k))[1])
    train(tmp_path, sharding="fsdp", accumulation=3, steps=4, save_every=0)
    assert len(calls) == 4 * 2  # of the two layers; what else the module holds is frozen


def test_bfloat16_keeps_float32_weights(tmp_path: Path) -> None:
    """Computed in bfloat16, updated in float32: a step of 1e-5 of a weight of 1 is lost in bfloat16."""

    def biased() -> FlowTask:
        task = FlowTask()
        with torch.no_grad():
            task.module.model.time_block.bias.fill_(1.0)
        return task

    seen, times, task = [], [], biased()
    task.module.register_forward_pre_hook(lambda _, args: times.append(args[0]["t"].dtype))
    task.module.model.layers[0].audio_spatial.mlp.fc2.register_forward_hook(
        lambda layer, _, out: seen.append((layer.weight.dtype, out.dtype))
    )
    train(tmp_path / "low", task, FlowSource(), precision="bf16", steps=2, learning_rate=1e-5, ema=0.0)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert times == [torch.float32] * 2  # inputs are not cast: bfloat16 has no 999 beside 1000
    for part in (task.module, *task.blocks()):
        assert part._get_fsdp_state()._mp_policy.reduce_dtype == torch.float32
    bias = read_weights(tmp_path / "low")["model.time_block.bias"]
    assert bias.dtype == torch.float32
    assert 0 < (bias - 1).abs().max() < 1e-4
    train(tmp_path / "exact", biased(), FlowSource(), steps=2, learning_rate=1e-5)
    low, exact = rows(tmp_path / "low")[0], rows(tmp_path / "exact")[0]
    assert low["loss"] != exact["loss"]
    assert low["loss"] == pytest.approx(exact["loss"], rel=3e-2)


def test_samples_see_averaged_whole_weights_and_disturb_nothing(tmp_path: Path) -> None:
    def draw(step: int, module: nn.Module) -> None:
        assert not module.training and not torch.is_grad_enabled()
        torch.rand(3)
        drawn[step] = {n: p.detach().clone() for n, p in module.named_parameters()}

    drawn: dict[int, Any] = {}
    train(tmp_path / "without")
    for name, sharding in (("with", "none"), ("sharded", "fsdp")):
        c = settings(tmp_path / name, sample_every=4, sharding=sharding)
        trainer = Trainer(ToyTask(noise=0.1), ToySource(), c, [Watcher(sample=draw)])
        trainer.run()
        assert sorted(drawn) == [4, 8, 12]
        assert trainer.module.training
        for step in (8, 12):
            wanted = read_weights(step_folder(c.out / "checkpoints", step))
            assert not any(isinstance(x, torch.distributed.tensor.DTensor) for x in drawn[step].values())
            for n, x in drawn[step].items():
                assert torch.equal(x, wanted[n]), n
        assert rows(tmp_path / name) == rows(tmp_path / "without")
        drawn.clear()


# -- signals, non-finite steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_then_ends_as_it_would_have(tmp_path: Path, number: signal.Signals) -> None:
    """As the command line does, whoever listened before is told after the checkpoint is finished."""
    told = []

    def ask(step: int, _: Any) -> None:
        if step == 6:
            os.kill(os.getpid(), number)

    before = signal.signal(number, lambda *_: told.append(sorted(p.name for p in finished(tmp_path / "checkpoints"))))
    try:
        Trainer(ToyTask(noise=0.1), ToySource(), settings(tmp_path), [Watcher(log=ask)]).run()
    finally:
        signal.signal(number, before)
    assert len(told) == 1 and told[0][-1] in ("step_0000006", "step_0000007")
    train(tmp_path)
    train(tmp_path.with_name("whole"))
    assert rows(tmp_path) == rows(tmp_path.with_name("whole"))


def test_it_runs_outside_the_main_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(tmp_path,))
    thread.start()
    thread.join(60)
    assert len(rows(tmp_path)) == 12


def test_a_nonfinite_step_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer = train(tmp_path, source=ToySource(bad=(3, 4)), save_every=0)
    assert trainer.guard.total == 2
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    assert "loss" not in rows(tmp_path)[3] and rows(tmp_path)[5]["skipped"] == 2
    weights = read_weights(tmp_path)
    assert all(x.isfinite().all() for x in weights.values())

    class Without(ToySource):
        """The same batches without the bad ones."""

        def next(self) -> dict[str, Any]:
            if self.number == 3:
                self.number = 5
            return super().next()

    other = tmp_path.with_name("without")
    train(other, ToyTask(), Without(), save_every=0, steps=10)
    skipped = tmp_path.with_name("skipped")
    train(skipped, ToyTask(), ToySource(bad=(3, 4)), save_every=0)
    a, b = read_weights(other), read_weights(skipped)
    assert all(torch.equal(a[name], b[name]) for name in a if name != "seen")  # a skipped step leaves no trace


def test_nonfinite_gradient_of_a_finite_loss(tmp_path: Path) -> None:
    task = ToyTask()
    forward = task.module.forward

    def with_bad_gradient(batch: dict[str, Any]) -> dict[str, Any]:
        losses = forward(batch)
        if batch["number"] == 2:
            losses["loss"] = losses["loss"] + (task.module.last.bias.sum() * 0).sqrt()  # 0, with a gradient of 0 / 0
        return losses

    task.module.forward = with_bad_gradient  # type: ignore[method-assign]
    assert train(tmp_path, task, save_every=0).guard.total == 1


def test_after_some_in_a_row_it_stops_and_keeps_the_batch(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = ToySource(bad=(1, 5, 6, 7))
    with pytest.raises(FailedError, match="loss is not finite in 3 steps in a row, up to step 8"):
        train(tmp_path, source=source, max_nonfinite=3)
    (saved,) = (tmp_path / "nonfinite").glob("*.safetensors")
    batch = ToySource(bad=(7,))
    batch.number = 7
    wanted = batch.next()
    found = load_file(saved)
    assert set(found) == {"x", "y"} and torch.equal(found["y"], wanted["y"]) and found["x"].isnan().any()
    assert json.loads(saved.with_suffix(".json").read_text())["ids"] == "['a', 'b', 'c', 'd']"
    assert finished(tmp_path / "checkpoints")[0].name == "step_0000004"


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must not be negative"),
        ({"ema": 1.5}, "ema must lie between 0 and 1"),
        ({"precision": "bf16", "sharding": "none"}, "precision bf16 needs --sharding fsdp"),
        ({"precision": "fp8"}, "precision fp8: needs a GPU with FP8 matrix products"),
        ({"precision": "fp8-te"}, "precision fp8-te: needs a GPU with FP8 matrix products"),
        ({"optimizer": "apex"}, "optimizer apex needs NVIDIA apex.*PyPI is another project"),
        ({"optimizer": "te"}, "optimizer te needs Transformer Engine"),
        ({"sequence_parallel": 2}, "FlowTask cannot share the tokens of a clip"),
        ({"replicas": 2, "sharding": "fsdp"}, "1 processes cannot be divided into 2 replicas"),
    ],
)
def test_what_cannot_run_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        train(tmp_path, FlowTask(), FlowSource(), **changes)


def fake_adam(monkeypatch: pytest.MonkeyPatch, module: str, fails: bool = False) -> type:
    """A stand-in for the fused optimizers: their arguments, and their step counted per group."""

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, params: Any, *, adam_w_mode: bool, **arguments: Any) -> None:
            if fails:
                raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")
            assert adam_w_mode
            super().__init__(params, **arguments)

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                assert all(type(p.data) is torch.Tensor for p in group["params"])  # no DTensor
            super().step()

    names = module.split(".")
    for i in range(1, len(names) + 1):
        made = ModuleType(".".join(names[:i]))
        made.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, made.__name__, made)
    made.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    return FusedAdam


@pytest.mark.parametrize("make, module", [("apex", "apex.optimizers"), ("te", "transformer_engine.pytorch.optimizers")])
def test_fused_optimizers_are_found_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, module: str
) -> None:
    made = fake_adam(monkeypatch, module)
    with pytest.raises(UsageError, match=f"optimizer {make} needs a GPU"):
        train(tmp_path / "cpu", optimizer=make)

    def here(groups: Any, config: EngineConfig, _: torch.device) -> Any:
        return made(groups, adam_w_mode=True, lr=config.learning_rate, betas=config.betas, eps=1e-8)

    monkeypatch.setattr("javis.train.optimizers.make_adamw", here)
    train(tmp_path / "whole", optimizer=make, sharding="fsdp")
    interrupted(tmp_path / "run", 9, async_save=False, optimizer=make, sharding="fsdp")
    trainer = train(tmp_path / "run", optimizer=make, sharding="fsdp")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert [group["step"] for group in trainer.optimizer.optimizer.param_groups] == [12, 12]


def test_another_package_called_apex_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    with pytest.raises(UsageError, match="PyPI is another project.*not a package"):
        train(tmp_path, optimizer="apex")


def test_what_cannot_run_here_leaves_no_process_group(tmp_path: Path) -> None:
    """The next training in this process starts its own."""
    with pytest.raises(UsageError, match="fp8"):
        Trainer(ToyTask(), ToySource(), settings(tmp_path, precision="fp8", sharding="fsdp")).run()
    assert not torch.distributed.is_initialized()
