"""Calls of bidirectional_attention: layouts, registration, torch.compile, the choice of the backend, bad input.

Tests 2 to 7 of an op (CONTRIBUTING.md, "Adding an op"); the numbers are in test_bidirectional_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import bidirectional_attention, native, use_backend
from javis.kernels.ops.bidirectional_attention import contract
from javis.kernels.triton_support import HAS_TRITON
from javis.model.ops import ModelOps
from tests.kernels.test_bidirectional_attention import (
    check_budget,
    every_dtype,
    fused,
    needs_native,
    needs_triton,
    reference,
    tensors,
    with_gradients,
)


def ops_that_ran(function: Callable[[], object]) -> list[str]:
    """Names of javis' ops and of PyTorch's attention that PyTorch's profiler saw, in compiled code too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    keys = [event.key for event in profile.key_averages()]
    return sorted(key for key in keys if key.startswith("javis::") or key == "aten::scaled_dot_product_attention")


# 2. to 4. Layouts, empty batches, registration ---------------------------------------------------------------------


@fused
@pytest.mark.usefixtures("poison")
def test_non_contiguous_inputs_give_the_same(backend: str) -> None:
    run = partial(bidirectional_attention, backend=backend)
    *inputs, heads = tensors(batch=2, video=9, audio=5, heads=1, size=16)
    expected = with_gradients(run, (*inputs, heads))

    def columns(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:2], 60), math.nan)
        wide[:, :, 12:28] = x
        return wide[:, :, 12:28]

    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "columns of a wider tensor": columns,
        "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    }
    for name, layout in layouts.items():
        views = [layout(x) for x in inputs]
        assert not any(x.is_contiguous() for x in views), name
        for key, value in with_gradients(run, (*views, heads)).items():
            torch.testing.assert_close(value, expected[key], msg=lambda m, name=name, key=key: f"{name}, {key}: {m}")
    # Gradients of a sum have stride 0.
    leaves = [x.requires_grad_() for x in inputs]
    got = torch.autograd.grad([y.sum() for y in run(*leaves, heads)], leaves)
    dense = torch.autograd.grad(run(*leaves, heads), leaves, [torch.ones(2, 9, 16), torch.ones(2, 5, 16)])
    for a, b in zip(got, dense, strict=True):
        torch.testing.assert_close(a, b)


@fused
@pytest.mark.parametrize(("batch", "video", "audio"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(batch: int, video: int, audio: int, backend: str) -> None:
    args = tensors(batch=batch, video=video, audio=audio, heads=2, size=8)
    expected = with_gradients(ModelOps().bidirectional_attention, args)
    for name, value in with_gradients(partial(bidirectional_attention, backend=backend), args).items():
        assert torch.equal(value, expected[name]), name


@fused
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted: bool, backend: str) -> None:
    *inputs, heads = tensors(batch=2, video=6, audio=5, heads=1, size=8)
    if permuted:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    tests = ("test_schema", "test_faketensor")  # gradients go through the autograd.Function, not through the op
    suffix = "_native" if backend == "cpu" else ""
    forward = getattr(torch.ops.javis, f"bidirectional_attention{suffix}").default
    backward = getattr(torch.ops.javis, f"bidirectional_attention{suffix}_backward").default
    torch.library.opcheck(forward, (*inputs, heads), test_utils=tests)
    results = forward(*inputs, heads)
    gradients = [torch.randn_like(y) for y in results[:2]]
    torch.library.opcheck(backward, (*gradients, *inputs, *results, heads), test_utils=tests)


@needs_native
def test_native_ops_say_what_they_write_and_refuse_what_does_not_fit() -> None:
    ops = torch.ops.javis_native
    scores, part = torch.randn(2, 4, 6), torch.zeros(2, 4, 6)
    rows, columns = torch.zeros(2, 4), [torch.zeros(2, 6) for _ in range(3)]
    arguments = (scores, part, torch.zeros(2, 4, 6), rows, *columns, 0.5)
    torch.library.opcheck(ops.bidirectional_softmaxes.default, arguments, test_utils=("test_schema",))
    backward = (scores, *(torch.zeros(2, 4, 6) for _ in range(3)), rows, rows, columns[0], columns[1], 0.5)
    torch.library.opcheck(ops.bidirectional_score_gradient.default, backward, test_utils=("test_schema",))
    with pytest.raises(RuntimeError, match="columns_part has size 5"):
        ops.bidirectional_softmaxes(scores, part, torch.zeros(2, 4, 5), *arguments[3:])
    with pytest.raises(RuntimeError, match="row_lse has the wrong dtype"):
        ops.bidirectional_softmaxes(*arguments[:3], rows.double(), *columns, 0.5)
    with pytest.raises(RuntimeError, match="dense within a head"):
        ops.bidirectional_softmaxes(scores.mT.contiguous().mT, *arguments[1:])


# 5. torch.compile --------------------------------------------------------------------------------------------------

BRANCHES = {
    "cpu": pytest.param("auto", torch.float32, ["javis::bidirectional_attention_native"], marks=needs_native),
    "triton": pytest.param("triton", torch.float32, ["javis::bidirectional_attention"], marks=needs_triton),
    "sdpa": ("sdpa", torch.float16, ["aten::scaled_dot_product_attention"]),
    "reference": ("auto", torch.float64, []),
}


@pytest.mark.parametrize(("backend", "dtype", "ops"), BRANCHES.values(), ids=BRANCHES.keys())
def test_compiles_to_one_graph(backend: str, dtype: torch.dtype, ops: list[str]) -> None:
    torch.compiler.reset()
    args = tensors(dtype, batch=1, video=6, audio=5, heads=1, size=8)
    function = partial(bidirectional_attention, backend=backend)
    # aot_eager traces forward and backward through the fakes like the default backend, without compiling C++ loops.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, args)
    for name, value in with_gradients(function, args).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")
    if backend != "sdpa":  # which is decomposed
        assert ops_that_ran(lambda: with_gradients(compiled, args)) == ops + [f"{op}_backward" for op in ops]


@needs_native
def test_compiled_code_follows_use_backend() -> None:
    torch.compiler.reset()
    args = tensors(batch=1, video=6, audio=5, heads=1, size=8)
    compiled = torch.compile(bidirectional_attention, fullgraph=True, backend="aot_eager")
    assert ops_that_ran(lambda: compiled(*args))
    with use_backend("reference"):
        assert not ops_that_ran(lambda: compiled(*args))
    assert ops_that_ran(lambda: compiled(*args))


# 6. and 7. The choice ----------------------------------------------------------------------------------------------


def test_the_named_backend_is_the_one_that_runs() -> None:
    args = tensors(batch=1, video=6, audio=5, heads=1, size=8)
    expected = {
        "reference": [],
        "sdpa": ["aten::scaled_dot_product_attention"],
    }
    if native.WHY_NOT is None:
        native_ops = ["javis::bidirectional_attention_native", "javis::bidirectional_attention_native_backward"]
        expected |= {"cpu": native_ops, "auto": native_ops}
    if HAS_TRITON:
        expected["triton"] = ["javis::bidirectional_attention", "javis::bidirectional_attention_backward"]
    for backend, ops in expected.items():
        run = partial(bidirectional_attention, backend=backend)
        assert ops_that_ran(lambda run=run: with_gradients(run, args)) == ops, backend
        with use_backend(backend):
            assert ops_that_ran(lambda: with_gradients(bidirectional_attention, args)) == ops, backend
            assert ops_that_ran(lambda: reference(*args)) == []  # the call's own word counts most


@pytest.mark.parametrize(
    ("backend", "dtype", "why"),
    [
        ("cuda", torch.float32, "needs CUDA tensors, got one on cpu"),
        ("flash_attn", torch.float32, "this op has no such implementation"),
        ("cpu", torch.float64, "float64|not built"),
        ("cpu", torch.float16, "float16|not built"),
        ("triton", torch.float64, "float64|not installed"),
        ("sdpa", torch.float64, "float64 goes to the reference"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, why: str) -> None:
    args = tensors(dtype, batch=1, video=3, audio=2, heads=1, size=8)
    with pytest.raises(UsageError, match=why):
        bidirectional_attention(*args, backend=backend)
    if "no such implementation" not in why:  # a default that an op does not have leaves it at auto
        with use_backend(backend), pytest.raises(UsageError, match=why):
            bidirectional_attention(*args)


def test_what_the_triton_kernels_and_sdpa_cannot_hold() -> None:
    wide = tensors(batch=1, video=3, audio=2, heads=1, size=136)
    assert contract.why_not_triton(*wide) == "head size 136, the kernels hold up to 128"
    many = [torch.empty(70000, n, 1, device="meta") for n in (3, 2, 3, 2)]
    assert contract.why_not_triton(*many, 1) == "batch * heads is 70000, a launch grid holds up to 65535"
    empty = tensors(batch=1, video=3, audio=0, heads=1, size=8)
    with pytest.raises(UsageError, match="nothing to attend to"):
        bidirectional_attention(*empty, backend="sdpa")


@every_dtype
def test_sdpa_is_within_budget(dtype: torch.dtype) -> None:
    args = tensors(dtype, batch=2, video=40, audio=20, heads=2, size=72)
    check_budget(partial(bidirectional_attention, backend="sdpa"), args, ModelOps().bidirectional_attention)


def test_float16_and_float64_run_under_auto() -> None:
    for dtype in (torch.float16, torch.float64):
        results = bidirectional_attention(*tensors(dtype, batch=1, video=3, audio=2, heads=1, size=8))
        assert [y.dtype for y in results] == [dtype, dtype]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_video": torch.zeros(2, 12)}, "q_video must be"),
        ({"q_video": torch.zeros(2, 6, 12, dtype=torch.long)}, "q_video must be"),
        ({"num_heads": 5}, "num_heads must divide"),
        ({"num_heads": 0}, "num_heads must divide"),
        ({"q_audio": torch.zeros(2, 3, 11)}, "q_audio must be"),
        ({"q_audio": torch.zeros(1, 3, 12)}, "q_audio must be"),
        ({"v_video": torch.zeros(2, 3, 12)}, "v_video must be"),
        ({"v_audio": torch.zeros(2, 6, 12)}, "v_audio must be"),
        ({"v_audio": torch.zeros(2, 3, 12, dtype=torch.bfloat16)}, "v_audio must be torch.float32 like q_video, got"),
        ({"v_audio": torch.zeros(2, 3, 12, device="meta")}, "v_audio must be on cpu like q_video, got meta"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    video, audio = torch.zeros(2, 6, 12), torch.zeros(2, 3, 12)
    arguments = {"q_video": video, "q_audio": audio, "v_video": video, "v_audio": audio, "num_heads": 3} | change
    with pytest.raises(ValueError, match=message):
        bidirectional_attention(**arguments)
