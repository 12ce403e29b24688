"""Calls of factorized_attention: layouts, registration, torch.compile, the choice of the backend, bad input.

Tests 2 to 7 of an op (CONTRIBUTING.md, "Adding an op"); the numbers are in test_factorized_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import native, use_backend
from javis.kernels.ops.factorized_attention import contract
from javis.kernels.ops.factorized_attention.api import factorized_attention
from javis.kernels.triton_support import HAS_TRITON
from tests.kernels.calls import ops_that_ran
from tests.kernels.test_factorized_attention import NATIVE, TRITON, case, needs_native, needs_triton, op, results, run

NATIVE_OPS = ["javis_native::temporal_attention", "javis_native::temporal_attention_backward"]
SPATIAL_OPS = ["javis_native::qk_norm_rope", "javis_native::qk_norm_rope_backward"]  # before and after the library's
BEFORE_LIBRARY = SPATIAL_OPS if native.WHY_NOT is None else []
TRITON_OPS = ["javis::factorized_attention", "javis::factorized_attention_backward"]
# The axes that each backend has kernels for.
AXES = [
    pytest.param("cpu", "temporal", marks=needs_native),
    pytest.param("cpu", "spatial", marks=needs_native),
    pytest.param("triton", "temporal", marks=needs_triton),
    pytest.param("triton", "spatial", marks=needs_triton),
    ("sdpa", "temporal"),
    ("sdpa", "spatial"),
]

# 2. to 4. Layouts, empty batches, registration ------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("backend", "axis"), AXES)
def test_non_contiguous_inputs_give_the_same(backend: str, axis: str) -> None:
    (qkv, _), kwargs = case(axis=axis, batch=2, frames=2, places=2, heads=1, size=16, rope=True).inputs()
    wide = torch.full((2, 2, 2, 3, 3, 16), float("nan"))
    wide[:, :, :, :, 1:2] = qkv
    expected = run(op(backend), qkv, axis, kwargs)
    for name, layout in {
        "heads of a wider tensor": wide[:, :, :, :, 1:2],
        "places first": qkv.transpose(1, 2).contiguous().transpose(1, 2),
        "values first": qkv.transpose(3, 5).contiguous().transpose(3, 5),
        "offset by one value": torch.cat((torch.zeros(1), qkv.flatten()))[1:].view(qkv.shape),
    }.items():
        strided = kwargs | {"q_weight": torch.stack([kwargs["q_weight"]] * 2, 1)[:, 0]}
        for key, value in run(op(backend), layout, axis, strided).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", [NATIVE, TRITON])
def test_broadcast_gradient(backend: str) -> None:
    (qkv, axis), _ = case(frames=3, places=2, heads=2, size=8).inputs()
    leaf = qkv.requires_grad_()
    y = factorized_attention(leaf, axis, backend=backend)
    (spread,) = torch.autograd.grad(y.sum(), leaf)  # sum() hands back a dy of stride 0
    (dense,) = torch.autograd.grad(factorized_attention(leaf, axis, backend=backend), leaf, torch.ones_like(y))
    assert torch.equal(spread, dense)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
@pytest.mark.parametrize(("backend", "axis"), [*AXES, ("reference", "temporal"), ("reference", "spatial")])
def test_nothing_to_do(backend: str, sizes: tuple[int, int, int], axis: str) -> None:
    batch, frames, places = sizes
    qkv = torch.zeros(batch, frames, places, 3, 2, 8)
    found = run(op(backend), qkv, axis, {"q_weight": torch.ones(8), "k_weight": torch.ones(8)})
    assert found["y"].shape == (batch, frames * places, 16)
    assert found["dqkv"].shape == qkv.shape
    assert torch.equal(found["dq_weight"], torch.zeros(8))


@needs_native
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_opcheck_native(permuted: bool, bare: bool) -> None:
    ops = torch.ops.javis_native
    args, dout = registered(permuted, bare, frames=3, places=4)
    tests = ("test_schema", "test_faketensor")  # gradients go through the autograd.Function, not through the op
    args = (*args[:4], args[5])
    torch.library.opcheck(ops.temporal_attention.default, args, test_utils=tests)
    torch.library.opcheck(ops.temporal_attention_backward.default, (dout, *args), test_utils=tests)


@needs_triton
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("frames", [2, 129])
def test_opcheck_triton(permuted: bool, frames: int) -> None:
    ops = torch.ops.javis
    args, dout = registered(permuted, frames == 129, frames=frames, places=4 - min(frames, 3))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.factorized_attention.default, args, test_utils=tests)
    out, lse = ops.factorized_attention(*args)
    given = (dout, args[0], out if frames > contract.MAX_SHORT else None, lse, *args[1:])
    torch.library.opcheck(ops.factorized_attention_backward.default, given, test_utils=tests)


def registered(permuted: bool, bare: bool, frames: int, places: int) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of the registered ops: (qkv, weights, cos, sin, temporal, eps), and dout."""
    batch = 1 if frames > 100 else 2
    made = case(batch=batch, frames=frames, places=places, heads=1, size=16, rope=True)
    (qkv, _), kwargs = made.inputs()
    dout = torch.randn(batch, frames * places, 16)
    if permuted:
        qkv, dout = qkv.transpose(1, 2).contiguous().transpose(1, 2), dout.transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = (None, None) if bare else kwargs["rope"]
    weights = None if bare else torch.stack((kwargs["q_weight"], kwargs["k_weight"]))
    return (qkv, weights, cos, sin, True, 1e-6), dout


@needs_native
def test_native_op_refuses_what_the_api_never_sends() -> None:
    attention = torch.ops.javis_native.temporal_attention
    qkv, table = torch.zeros(2, 3, 4, 3, 2, 8), torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="qkv must be"):
        attention(qkv[0], None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="weights has size 7"):
        attention(qkv, torch.zeros(2, 7), None, None, 1e-6)
    with pytest.raises(RuntimeError, match="both of cos and sin"):
        attention(qkv, None, table, None, 1e-6)
    with pytest.raises(RuntimeError, match="cos has size 3"):
        attention(qkv, None, table[:, :3], table, 1e-6)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        attention(qkv.half(), None, None, None, 1e-6)


@pytest.mark.parametrize("backend", [NATIVE, TRITON])
def test_nothing_is_written_outside(backend: str) -> None:
    """The values around a view of qkv stay as they were."""
    around = torch.full((1, 5, 4, 3, 3, 8), 42.0)
    (qkv, axis), kwargs = case(frames=3, places=2, heads=1, size=8, rope=True).inputs()
    around[:, 1:4, 1:3, :, 1:2] = qkv
    before = around.clone()
    run(op(backend), around[:, 1:4, 1:3, :, 1:2], axis, kwargs)
    assert torch.equal(around, before)


# 5. torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "axis", "dtype"),
    [
        ("auto", "temporal", torch.float32),  # native
        ("auto", "spatial", torch.float32),  # native, then the library
        ("auto", "temporal", torch.float64),  # the reference
        pytest.param("triton", "temporal", torch.float32, marks=needs_triton),
        pytest.param("triton", "spatial", torch.float32, marks=needs_triton),
    ],
)
def test_compiles_to_one_graph(backend: str, axis: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    made = case(dtype, axis=axis, frames=3, places=2, heads=1, size=16, rope=True)
    # aot_eager traces forward and backward through the fakes like the default backend, without compiling C++ loops.
    compiled = torch.compile(op(backend), fullgraph=True, backend="aot_eager")
    expected = results(op(backend), made)
    found: dict[str, Tensor] = {}
    ran = ops_that_ran(lambda: found.update(results(compiled, made)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")
    if backend == "triton":
        assert ran == TRITON_OPS
    elif axis == "temporal" and dtype is torch.float32 and native.WHY_NOT is None:
        assert ran == NATIVE_OPS
    elif dtype is torch.float32:
        assert ran == BEFORE_LIBRARY
    else:
        assert ran == []


# 6. and 7. The choice -------------------------------------------------------------------------------------------------


def test_the_named_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(frames=2, places=2, heads=1, size=8)
    spatial = case(axis="spatial", frames=2, places=2, heads=1, size=8)
    if native.WHY_NOT is None:
        assert ops_that_ran(lambda: results(op("cpu"), made)) == NATIVE_OPS
        assert ops_that_ran(lambda: results(factorized_attention, made)) == NATIVE_OPS
    if HAS_TRITON:
        assert ops_that_ran(lambda: results(op("triton"), made)) == TRITON_OPS
        assert ops_that_ran(lambda: results(op("triton"), spatial)) == TRITON_OPS
    sdpa = "aten::scaled_dot_product_attention"
    if native.WHY_NOT is None:  # with gradients the native attention, whatever the processor
        assert ops_that_ran(lambda: results(op("auto"), spatial)) == ["javis_native::dense_attention", *BEFORE_LIBRARY]
    for backend, shape, uses in (("sdpa", made, True), ("sdpa", spatial, True), ("reference", made, False)):
        assert (sdpa in ops_that_ran(lambda s=shape, b=backend: results(op(b), s), prefix="aten::scaled")) is uses
        assert ops_that_ran(lambda s=shape, b=backend: results(op(b), s)) == (BEFORE_LIBRARY if uses else [])
    with use_backend("sdpa"):
        assert sdpa in ops_that_ran(lambda: results(factorized_attention, made), prefix="aten::scaled")


@pytest.mark.parametrize(
    ("backend", "axis", "dtype", "why"),
    [
        ("cuda", "temporal", torch.float32, "needs CUDA tensors, got one on cpu"),
        ("flash_attn", "spatial", torch.bfloat16, "flash-attn is not installed|needs a CUDA device"),
        ("cpu", "spatial", torch.float64, "float64|not built"),
        ("cpu", "temporal", torch.float16, "float16|not built"),
        ("triton", "temporal", torch.float64, "float64|not installed"),
        ("sdpa", "spatial", torch.float64, "by the reference"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, axis: str, dtype: torch.dtype, why: str) -> None:
    (qkv, _), _ = case(dtype, axis=axis, frames=1, places=2, heads=1, size=8).inputs()
    with pytest.raises(UsageError, match=why):
        factorized_attention(qkv, axis, backend=backend)
    if "no such implementation" not in why:  # a default that an op does not have leaves it at auto
        with use_backend(backend), pytest.raises(UsageError, match=why):
            factorized_attention(qkv, axis)


def test_flash_attn_says_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "HAS_FLASH_ATTN", True)
    cuda = torch.empty(1, 1, 1, 3, 1, 20, device="meta")
    assert "needs a CUDA device" in str(contract.why_not_flash_attn(cuda))
    monkeypatch.setattr(contract, "HAS_FLASH_ATTN", False)
    assert "pip install" in str(contract.why_not_flash_attn(cuda))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": "time"}, 'axis must be "temporal" or "spatial"'),
        ({"qkv": torch.zeros(1, 2, 3, 2, 1, 8)}, "qkv must be"),
        ({"qkv": torch.zeros(1, 2, 3, 3, 1, 8, dtype=torch.long)}, "qkv must be"),
        ({"q_weight": torch.zeros(7)}, "q_weight must be a floating-point .8."),
        ({"k_weight": None}, "k_weight is missing"),
        ({"rope": torch.zeros(2, 4)}, "rope must be"),
        ({"rope": (torch.zeros(3, 4), torch.zeros(3, 4))}, "rope.0. .cos. must be a floating-point .2, 4."),
        ({"rope": (torch.zeros(2, 4), torch.zeros(2, 8))}, "rope.1. .sin."),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference", "triton", "cpu"])
def test_bad_arguments(change: dict[str, Any], message: str, backend: str) -> None:
    arguments: dict[str, Any] = {
        "qkv": torch.zeros(1, 2, 3, 3, 1, 8), "axis": "temporal", "q_weight": torch.ones(8), "k_weight": torch.ones(8),
        "rope": (torch.ones(2, 4), torch.zeros(2, 4)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        factorized_attention(**(arguments | change), backend=backend)


# Launches -------------------------------------------------------------------------------------------------------------


@needs_triton
def test_more_sequences_than_the_second_axis_of_a_launch_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA: 2^31 - 1 programs on the first axis of a launch, 65,535 on the others. 70,000 heads of 129 places."""
    from javis.kernels.ops.factorized_attention.flash import triton_impl as flash

    grids: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("_forward_kernel", "_backward_q_kernel", "_backward_kv_kernel"):
        monkeypatch.setattr(flash, name, Recorded())
    q = torch.zeros(1).expand(1, 70_000 // 16, 129, 16, 8)
    lse = flash.forward(q, q, q, q, None, None, None, 1e-6)
    flash.backward(q, q, q, q, q, lse, q, q, q, None, None, None, 1e-6)
    sequences = q.shape[1] * 16
    assert grids == [(2 * sequences,), (3 * sequences,), (3 * sequences,)]
