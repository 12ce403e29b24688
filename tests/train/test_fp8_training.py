"""FP8 in training: gradients of the products against float64, the model in it, Transformer Engine as a stand-in."""

from __future__ import annotations

import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from javis.errors import UsageError
from javis.model.blocks import PriorAttention
from javis.model.dit import JavisDiT
from javis.precision import linear_names, product
from javis.train import fp8_training
from javis.train.engine import EngineConfig, Trainer
from javis.train.fp8_training import fp8_gelu_linear, fp8_linear, train_in_fp8

from .engine_task import FlowSource, FlowTask, rows, tiny_model

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_heads": 2, "mlp_ratio": 2.0}  # that 16 divides


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(actual: Tensor, exact: Tensor, dim: int) -> float:
    """The largest relative RMS error of a row (dim=-1) or a column."""
    difference = (actual.double() - exact).square().mean(dim).sqrt()
    return float((difference / exact.square().mean(dim).sqrt()).max().detach())


def test_gradients_of_a_product() -> None:
    """Rows of the activations and of the gradient have scales of their own."""
    x, weight, bias, grad = draw(2, 24, 64), draw(48, 64, seed=1), draw(48, seed=2), draw(2, 24, 48, seed=3)
    x[:, 3] *= 1e4
    grad[:, 5] *= 1e-5
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = fp8_linear(x, weight, bias, emulate=True)
    d_x, d_weight, d_bias = torch.autograd.grad(out, leaves, grad)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = nn.functional.linear(exact[0], exact[1], exact[2])
    e_x, e_weight, e_bias = torch.autograd.grad(wanted, exact, grad.double())
    assert 1e-3 < error(out, wanted.detach(), -1) < 0.06
    assert 1e-3 < error(d_x, e_x, -1) < 0.06
    torch.testing.assert_close(d_weight.double(), e_weight, rtol=1e-4, atol=1e-1)  # sums of values up to 1e4
    torch.testing.assert_close(d_bias.double(), e_bias, rtol=1e-5, atol=1e-5)


def test_weights_are_scaled_along_what_a_product_sums_over() -> None:
    """By outputs forward, by inputs backward: with the other scale the small ones would be lost beside the large."""
    x, grad = draw(40, 64).requires_grad_(), draw(40, 48, seed=3)
    rows_apart, columns_apart = draw(48, 64, seed=1), draw(48, 64, seed=1)
    rows_apart *= torch.logspace(-4, 4, 48)[:, None]
    columns_apart *= torch.logspace(-4, 4, 64)
    out = fp8_linear(x, rows_apart, None, emulate=True)
    assert error(out, x.detach().double() @ rows_apart.double().t(), 0) < 0.06
    (d_x,) = torch.autograd.grad(fp8_linear(x, columns_apart, None, emulate=True), [x], grad)
    assert error(d_x, grad.double() @ columns_apart.double(), 0) < 0.06


def test_gelu_and_layers_without_bias_or_gradient() -> None:
    x, weight = draw(5, 32).requires_grad_(), draw(16, 32, seed=1)
    out = fp8_gelu_linear(x, weight, None, emulate=True)
    (d_x,) = torch.autograd.grad(out.sum(), [x])
    exact = x.detach().double().requires_grad_()
    wanted = nn.functional.gelu(exact @ weight.double().t(), approximate="tanh")
    assert error(out, wanted.detach(), -1) < 0.1
    assert error(d_x, torch.autograd.grad(wanted.sum(), [exact])[0], -1) < 0.1


def layers(model: JavisDiT) -> list[nn.Module]:
    return list(model.layers)


def wide_names(model: JavisDiT) -> list[str]:
    """Of the layers that see every token: those of inference, and the prior attentions', which are folded there."""
    prior = [f"{name}.attn.{part}" for name, m in model.named_modules() if isinstance(m, PriorAttention)
             for part in ("q", "proj")]  # fmt: skip
    return linear_names(model) + prior


def test_every_layer_that_sees_every_token_is_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(weight.values.shape))
        return product(x, weight, *args, **kwargs)

    monkeypatch.setattr(fp8_training, "product", counted)
    task = FlowTask(**SIZES)
    names = [name for name, _ in task.module.named_parameters()]
    train_in_fp8(layers(task.module.model), "fp8", CPU, emulate=True)
    assert [name for name, _ in task.module.named_parameters()] == names
    task.module(FlowSource().next())
    shapes = [tuple(task.module.model.get_submodule(n).weight.shape) for n in wide_names(task.module.model)]
    assert sorted(calls) == sorted(shapes)


def test_it_trains_as_bfloat16_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine: weights in float32, sharded, activations computed again; the products are emulated."""
    monkeypatch.setattr(fp8_training, "why_not", lambda *_: None)
    monkeypatch.setattr(fp8_training, "product", lambda *args, emulate: product(*args, emulate=True))
    told: dict[str, Any] = {"device": "cpu", "steps": 20, "learning_rate": 3e-3, "log_every": 1, "ema": 0.0}
    for precision in ("bf16", "fp8"):
        config = EngineConfig(out=tmp_path / precision, precision=precision, activation_checkpointing="full", **told)
        Trainer(FlowTask(layers=True, **SIZES), FlowSource(), config).run()
    low, eight = rows(tmp_path / "bf16"), rows(tmp_path / "fp8")
    assert low[0]["loss"] != eight[0]["loss"]
    assert eight[0]["loss"] == pytest.approx(low[0]["loss"], rel=0.05)
    fallen = low[0]["loss"] - low[-1]["loss"]
    assert fallen > 0.1 * low[0]["loss"]
    assert eight[-1]["loss"] == pytest.approx(low[-1]["loss"], abs=0.3 * fallen)


def test_what_cannot_be_in_fp8() -> None:
    with pytest.raises(UsageError, match=r"precision fp8: needs a GPU with FP8 matrix products .* on cpu; use bf16"):
        train_in_fp8(layers(tiny_model(**SIZES)), "fp8", CPU)
    with pytest.raises(UsageError, match=r"is \(48, 24\): FP8 needs sizes that 16 divides"):
        train_in_fp8(layers(tiny_model()), "fp8", CPU, emulate=True)
    with pytest.raises(UsageError, match="no linear layer in blocks of JavisDiT"):
        train_in_fp8([nn.Linear(16, 16)], "fp8", CPU, emulate=True)
    with pytest.raises(ValueError, match="is not one of FP8"):
        train_in_fp8(layers(tiny_model()), "bf16", CPU)


@pytest.mark.parametrize("new", [False, True], ids=["before 2.9", "since 2.9"])
def test_transformer_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, new: bool) -> None:
    """Its layers hold the same parameters under the same names, and run in its context, computed again or not."""
    events: list[str] = []
    inside: list[bool] = []

    class Context:
        def __init__(self, **told: Any) -> None:
            assert told == {"enabled": True, "recipe" if new else "fp8_recipe": ("current", "hybrid")}

        def __enter__(self) -> None:
            events.append("in")

        def __exit__(self, *_: object) -> None:
            events.append("out")

    class Linear(nn.Linear):
        def __init__(self, size_in: int, size_out: int, *, bias: bool, params_dtype: Any, device: Any) -> None:
            super().__init__(size_in, size_out, bias=bias, dtype=params_dtype, device=device)

        def forward(self, x: Tensor) -> Tensor:
            inside.append(events[-1] == "in")
            return super().forward(x)

    te, recipe = types.ModuleType("transformer_engine.pytorch"), types.ModuleType("transformer_engine.common.recipe")
    te.Linear = Linear  # type: ignore[attr-defined]
    setattr(te, "autocast" if new else "fp8_autocast", Context)
    recipe.Format = types.SimpleNamespace(HYBRID="hybrid")  # type: ignore[attr-defined]
    recipe.Float8CurrentScaling = lambda *, fp8_format: ("current", fp8_format)  # type: ignore[attr-defined]
    package, common = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.common")
    package.pytorch, package.common, common.recipe = te, common, recipe  # type: ignore[attr-defined]
    for module in (package, te, common, recipe):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fp8_training, "why_not", lambda *_: None)
    train = partial(EngineConfig, device="cpu", steps=3, log_every=1, ema=0.0, activation_checkpointing="full")
    task = FlowTask(layers=True, **SIZES)
    wanted = {name: (p.shape, p.requires_grad) for name, p in task.module.named_parameters()}
    Trainer(task, FlowSource(), train(out=tmp_path / "te", precision="fp8-te")).run()
    model = task.module.model
    assert all(type(model.get_submodule(name)) is not nn.Linear for name in wide_names(model))
    assert isinstance(model.get_submodule("layers.0.audio_prior.mlp.fc1"), Linear)
    assert all(inside) and len(inside) == 3 * 2 * len(wide_names(model))
    assert {name: (p.shape, p.requires_grad) for name, p in task.module.named_parameters()} == wanted
    Trainer(FlowTask(layers=True, **SIZES), FlowSource(), train(out=tmp_path / "plain", precision="bf16")).run()
    for a, b in zip(rows(tmp_path / "te"), rows(tmp_path / "plain"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
