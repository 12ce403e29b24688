"""The FLOPs and bytes that speeds and shares are stated by, against PyTorch's counter and against a real step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from javis.kernels import OPS
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.plan import token_grid
from javis.work import Work, floor_seconds, step_work, total

# Ops whose FLOPs are those of matrix products; the others count elementwise arithmetic, which the counter does not see.
PRODUCTS = (
    "factorized_attention",
    "text_cross_attention",
    "prior_injection",
    "folded_prior_injection",
    "bidirectional_attention",
    "gelu_linear",
    "linear",
)
CONFIG = JavisDiTConfig(
    hidden_size=48, num_heads=4, depth=2, caption_channels=20, caption_length=7, spatial_prior_len=2,
    temporal_prior_len=5, prior_channels=12, pred_sigma=False,
)  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_an_op_are_those_that_pytorch_counts(name: str) -> None:
    small = [case.smaller(flops=3e7, bytes=3e6) for case in OPS[name].cases() if case.dtype == torch.float32]
    for case in small:
        args, kwargs = case.inputs()
        # The counter does not know the fused attention of CPUs; the plain one is two products that it does know.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            OPS[name].function(*args, **kwargs, backend="reference")
        assert counter.get_total_flops() == case.flops(), case


def test_the_rest_counts_no_products() -> None:
    for name in set(OPS) - set(PRODUCTS):
        case = min(OPS[name].cases(), key=lambda case: case.bytes())
        args, kwargs = case.inputs()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            OPS[name].function(*args, **kwargs, backend="reference")
        assert counter.get_total_flops() == 0, name


def recorded_step(folded: bool) -> tuple[Counter[str], dict[str, int], list[Work]]:
    """Calls of each op in a real step, the bytes of the tensors that they took and gave, and what is planned."""
    calls: Counter[str] = Counter()
    moved: dict[str, int] = {}

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            results = [result] if isinstance(result, Tensor) else list(result)
            tensors = [t for t in [*args, *kwargs.values(), *results] if isinstance(t, Tensor)]
            calls[name] += 1
            moved[name] = moved.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)
            return result

        return call

    ops = ModelOps(**{field.name: watch(field.name, getattr(ModelOps(), field.name)) for field in fields(ModelOps)})
    model, batch, video, audio = JavisDiT(CONFIG, ops).requires_grad_(False), 2, (5, 20, 24), (60, 6)
    sizes = {name: torch.full((batch,), 64.0) for name in ("fps", "height", "width")}
    priors = {"spatial_prior": torch.randn(batch, 2, 12), "temporal_prior": torch.randn(batch, 5, 12)}
    with torch.set_grad_enabled(not folded):
        told = model.condition(torch.randn(batch, 7, 20), **sizes, video_sizes=video, audio_sizes=audio, **priors)
    with torch.no_grad():
        model.denoise(torch.randn(batch, 4, *video), torch.randn(batch, 8, *audio), torch.full((batch,), 500.0), told)
    grid = token_grid(CONFIG, video, audio)
    return calls, moved, step_work(CONFIG, grid, batch=batch, folded=folded, dtype=torch.float32)


@pytest.mark.parametrize("folded", [True, False])
def test_a_step_makes_the_planned_calls_and_moves_the_planned_bytes(folded: bool) -> None:
    calls, moved, work = recorded_step(folded)
    names = {"gated_residual": "residual"}  # no op of the registry, so it has no case
    assert {w.op for w in work} - {"embedding", "layer_norm"} == {names.get(name, name) for name in calls}
    for name, count in calls.items():
        mine = [w for w in work if w.op == names.get(name, name)]
        planned = sum(w.calls for w in mine)
        if name == "gated_residual":
            planned -= 2 * CONFIG.depth  # after the attention between the streams, which the model writes out
        assert planned == count, name
        if name != "gated_residual":
            assert sum(w.bytes for w in mine) == pytest.approx(moved[name], rel=0.05), name
    # Both axes fold only where it saves work, and with few keys it does; unfolded there are projections instead.
    assert ("folded_prior_injection" in calls) == folded


def test_the_floor_is_what_holds_each_call_back() -> None:
    def work(flops: int, moved: int, kind: str = "linear") -> Work:
        return Work(op="x", kind=kind, stage="video", calls=1, flops=flops, bytes=moved)

    both = [work(100, 1), work(1, 100, "elementwise")]
    assert total(both) == (100, 101)
    assert floor_seconds(both, flops_per_s=10, bytes_per_s=5) == pytest.approx(100 / 10 + 100 / 5)
    # At the size of the paper a step is held back by arithmetic: the roofline is little above the FLOPs alone.
    grid = token_grid(JavisDiTConfig(), (15, 64, 64), (56, 16))
    step = step_work(JavisDiTConfig(), grid, batch=2)
    alone = total(step)[0] / 500e12
    assert alone < floor_seconds(step, 500e12, 3e12) < 1.5 * alone
