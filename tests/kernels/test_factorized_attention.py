"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for factorized_attention. Test 9: tests/test_imports.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import native, use_backend
from javis.kernels.ops.factorized_attention import contract
from javis.kernels.ops.factorized_attention.api import factorized_attention
from javis.kernels.ops.factorized_attention.cases import FactorizedAttentionCase
from javis.kernels.testing import assert_within_budget
from javis.kernels.triton_support import HAS_TRITON
from javis.model.ops import ModelOps
from tests.kernels.calls import ops_that_ran, run_on_isa, with_gradients

needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
NATIVE = pytest.param("cpu", marks=needs_native)
TRITON = pytest.param("triton", marks=needs_triton)
DTYPES = [torch.float32, torch.bfloat16]
NATIVE_OPS = ["javis_native::temporal_attention", "javis_native::temporal_attention_backward"]
TRITON_OPS = ["javis::factorized_attention", "javis::factorized_attention_backward"]

# One frame, odd sizes, heads in one padded tile (8, 6), in two (72 = 64 + 8, 24 = 16 + 8), in one full one (16).
TEMPORAL: list[dict[str, Any]] = [
    {"batch": 1, "frames": 1, "places": 1, "heads": 1, "size": 8, "rope": True},
    {"batch": 2, "frames": 5, "places": 3, "heads": 1, "size": 72, "rope": True},
    {"batch": 1, "frames": 17, "places": 2, "heads": 2, "size": 24, "norm": False, "rope": True},
    {"batch": 1, "frames": 3, "places": 1, "heads": 3, "size": 16},
    {"batch": 1, "frames": 3, "places": 2, "heads": 1, "size": 6, "norm": False},
]
# Short sequences of the other axis; two blocks of queries, three of keys and a remainder, with a norm and with nothing
# done before; frames as sequences longer than one tile.
SPATIAL: list[dict[str, Any]] = [
    {"axis": "spatial", "batch": 2, "frames": 2, "places": 5, "heads": 2, "size": 24},
    {"axis": "spatial", "batch": 1, "frames": 1, "places": 130, "heads": 1, "size": 72},
    {"axis": "spatial", "batch": 1, "frames": 1, "places": 141, "heads": 1, "size": 16, "norm": False},
    {"axis": "temporal", "batch": 1, "frames": 131, "places": 2, "heads": 1, "size": 24, "rope": True},
]


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> FactorizedAttentionCase:
    return FactorizedAttentionCase(name="test", dtype=dtype, **shape)


def results(
    function: Callable[..., Tensor], made: FactorizedAttentionCase, dtype: torch.dtype | None = None, seed: int = 1
) -> dict[str, Tensor]:
    """Output and gradients of qkv and of the weights, where the case has some."""
    (qkv, axis), kwargs = made.inputs(seed=seed)
    return run(function, qkv, axis, kwargs, dtype)


def run(
    function: Callable[..., Tensor], qkv: Tensor, axis: str, kwargs: dict[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    weights = [name for name in ("q_weight", "k_weight") if name in kwargs]

    def call(qkv: Tensor, *given: Tensor) -> Tensor:
        return function(qkv, axis, **dict(zip(weights, given, strict=True)), rope=kwargs.get("rope"))

    return with_gradients(call, ["qkv", *weights], [qkv, *(kwargs[name] for name in weights)], dtype=dtype)


def op(backend: str) -> Callable[..., Tensor]:
    return partial(factorized_attention, backend=backend)


# 1. Budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TEMPORAL, ids=lambda s: "-".join(map(str, s.values())))
def test_temporal_is_within_budget(shape: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    made = case(dtype, **shape)
    exact = results(op("reference"), made, torch.float64)
    # The native kernel keeps float32 inside; Triton and libraries round q, k and the probabilities for the products, as
    # plain PyTorch does.
    same_dtype = results(op("reference") if backend == "cpu" else ModelOps().factorized_attention, made)
    for name, value in results(op(backend), made).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", [TRITON, "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SPATIAL, ids=lambda s: "-".join(map(str, s.values())))
def test_spatial_is_within_budget(shape: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    made = case(dtype, **shape)
    exact = results(op("reference"), made, torch.float64)
    same_dtype = results(ModelOps().factorized_attention, made)
    for name, value in results(op(backend), made).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@needs_native
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_at_other_lengths(dtype: torch.dtype) -> None:
    """A full tile, more than one, many places of the sums for the weights, a head wider than any vector."""
    for shape in ((1, 16, 2, 2, 80), (1, 40, 1, 1, 128), (2, 2, 300, 2, 10), (1, 129, 1, 1, 4)):
        sizes = dict(zip(("batch", "frames", "places", "heads", "size"), shape, strict=True))
        made = case(dtype, rope=True, **sizes)
        exact, same_dtype = results(op("reference"), made, torch.float64), results(op("reference"), made)
        for name, value in results(op("cpu"), made).items():
            assert_within_budget(f"{shape} {name}", value, exact[name], same_dtype[name])


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_is_within_budget(isa: str) -> None:
    run_on_isa(
        isa,
        "import tests.kernels.test_factorized_attention as t\n"
        "for dtype in t.DTYPES:\n"
        "    t.test_native_at_other_lengths(dtype)\n"
        "    for shape in t.TEMPORAL: t.test_temporal_is_within_budget(shape, dtype, 'cpu')\n",
    )


@needs_triton
def test_float16_is_within_budget() -> None:
    made = case(torch.float16, frames=5, places=2, heads=1, size=24, rope=True)
    exact, same_dtype = results(op("reference"), made, torch.float64), results(ModelOps().factorized_attention, made)
    for name, value in results(op("triton"), made).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa", "reference"])
def test_large_scores_do_not_overflow(backend: str) -> None:
    """Scores of some thousands without a norm: the softmax is one key."""
    (qkv, axis), _ = case(frames=4, places=1, heads=1, size=16).inputs()
    y = factorized_attention(qkv * 200, axis, backend=backend)
    q, k, v = (200 * qkv[0, :, 0, part, 0] for part in range(3))
    torch.testing.assert_close(y[0], v[(q @ k.T).argmax(1)])


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "reference"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_comes_through_and_stays_in_its_head(backend: str, part: int) -> None:
    (qkv, axis), kwargs = case(frames=3, places=2, heads=2, size=8, rope=True).inputs()
    qkv[0, 1, 0, part, 1, 3] = float("nan")
    y = factorized_attention(qkv, axis, **kwargs, backend=backend).view(3, 2, 2, 8)
    touched = torch.zeros(3, 2, 2, 8, dtype=torch.bool)
    touched[1 if part == 0 else slice(None), 0, 1, 3 if part == 2 else slice(None)] = True
    assert torch.equal(y.isnan(), touched)


@needs_native
def test_native_result_does_not_depend_on_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(op("cpu"), case(batch=2, frames=4, places=37, heads=2, size=24, rope=True)))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        assert torch.equal(value, found[2][name]), name


@needs_native
def test_native_rounds_bfloat16_to_nearest() -> None:
    (qkv, axis), kwargs = case(torch.bfloat16, frames=7, places=2, heads=1, size=24, rope=True).inputs()
    wide = {name: value.float() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    expected = factorized_attention(qkv.float(), axis, **wide, backend="cpu").bfloat16()
    assert torch.equal(factorized_attention(qkv, axis, **kwargs, backend="cpu"), expected)


# 2. to 4. Layouts, empty batches, registration ------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa"])
@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_non_contiguous_inputs_give_the_same(backend: str, axis: str) -> None:
    if (backend, axis) == ("cpu", "spatial"):
        pytest.skip("no such kernel")
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


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa", "reference"])
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_nothing_to_do(backend: str, sizes: tuple[int, int, int], axis: str) -> None:
    if (backend, axis) == ("cpu", "spatial"):
        pytest.skip("no such kernel")
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
        ("auto", "spatial", torch.float32),  # sdpa
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
    for backend, shape, uses in (("sdpa", made, True), ("auto", spatial, True), ("reference", made, False)):
        assert (sdpa in ops_that_ran(lambda s=shape, b=backend: results(op(b), s), prefix="aten::scaled")) is uses
        assert ops_that_ran(lambda s=shape, b=backend: results(op(b), s)) == []
    with use_backend("sdpa"):
        assert sdpa in ops_that_ran(lambda: results(factorized_attention, made), prefix="aten::scaled")


@pytest.mark.parametrize(
    ("backend", "axis", "dtype", "why"),
    [
        ("cuda", "temporal", torch.float32, "no CUDA kernel in this version"),
        ("flash_attn", "spatial", torch.bfloat16, "flash-attn is not installed|needs a CUDA device"),
        ("cpu", "spatial", torch.float32, "only the temporal axis|not built"),
        ("cpu", "temporal", torch.float16, "float16|not built"),
        ("triton", "temporal", torch.float64, "float64|not installed"),
        ("sdpa", "spatial", torch.float64, "by the reference"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, axis: str, dtype: torch.dtype, why: str) -> None:
    (qkv, _), _ = case(dtype, axis=axis, frames=1, places=2, heads=1, size=8).inputs()
    with pytest.raises(UsageError, match=why):
        factorized_attention(qkv, axis, backend=backend)
    with use_backend(backend), pytest.raises(UsageError, match=why):
        factorized_attention(qkv, axis)


def test_flash_attn_says_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "HAS_FLASH_ATTN", True)
    cuda = torch.empty(1, 1, 1, 3, 1, 20, device="meta")
    assert "needs a CUDA device" in str(contract.why_not_flash_attn(cuda))
    monkeypatch.setattr(contract, "HAS_FLASH_ATTN", False)
    assert "pip install" in str(contract.why_not_flash_attn(cuda))


# 8. The reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_reference_gradients(axis: str) -> None:
    (qkv, _), kwargs = case(torch.float64, axis=axis, frames=2, places=2, heads=1, size=4, rope=True).inputs()
    leaves = [t.requires_grad_() for t in (qkv, kwargs["q_weight"], kwargs["k_weight"])]

    def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        return factorized_attention(
            qkv, axis, q_weight=q_weight, k_weight=k_weight, rope=kwargs["rope"], backend="reference"
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa", "reference"])
def test_case_by_hand(backend: str) -> None:
    """Two frames, D = 4. With norm weights (1, ...), q = (1, 1, 1, 1) and k = (1, 1, 1, 1), (-3, ...) are normalised to
    +1 and -1 everywhere: scores 4 / sqrt(4) = 2 and -2, so the first key weighs 1 / (1 + exp(-4))."""
    qkv = torch.zeros(1, 2, 1, 3, 1, 4)
    qkv[0, :, 0, 0] = 1.0
    qkv[0, 0, 0, 1], qkv[0, 1, 0, 1] = 1.0, -3.0
    qkv[0, 0, 0, 2], qkv[0, 1, 0, 2] = torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7, 8])
    ones = torch.ones(4)
    y = factorized_attention(qkv, "temporal", q_weight=ones, k_weight=ones, eps=0.0, backend=backend)
    first = 1 / (1 + math.exp(-4))
    expected = first * torch.tensor([1.0, 2, 3, 4]) + (1 - first) * torch.tensor([5.0, 6, 7, 8])
    torch.testing.assert_close(y, expected.expand(1, 2, 4), rtol=0, atol=1e-5)
    # A quarter turn of the second frame's pairs: its key is then perpendicular to the query of the first frame.
    rope = (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    y = factorized_attention(qkv, "temporal", q_weight=ones, k_weight=ones, rope=rope, eps=0.0, backend=backend)
    first = 1 / (1 + math.exp(-2))
    expected = first * torch.tensor([1.0, 2, 3, 4]) + (1 - first) * torch.tensor([5.0, 6, 7, 8])
    torch.testing.assert_close(y[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa", "reference"])
def test_time_and_place_are_told_apart(backend: str) -> None:
    """Equal keys make the output the mean of the values along the axis; the values say where they are from."""
    qkv = torch.zeros(1, 2, 3, 3, 1, 8)
    qkv[0, :, :, 2, 0] = (10 * torch.arange(2)[:, None] + torch.arange(3))[:, :, None].float()
    y = factorized_attention(qkv, "temporal", backend=backend)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([5.0, 6, 7, 5, 6, 7]))
    if backend != "cpu":
        y = factorized_attention(qkv, "spatial", backend=backend)
        torch.testing.assert_close(y[0, :, 0], torch.tensor([1.0, 1, 1, 11, 11, 11]))


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


# 10. On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_offsets_beyond_two_to_the_31(axis: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    length = 2**31 // (3 * 16 * 72) // 16 + 8
    frames, places = (16, length) if axis == "temporal" else (length, 16)
    qkv = torch.randn(1, frames, places, 3, 16, 72, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    y = factorized_attention(qkv, axis, backend="triton").view(frames, places, -1)
    last = (slice(None), slice(-1, None)) if axis == "temporal" else (slice(-1, None), slice(None))
    expected = factorized_attention(qkv[:, last[0], last[1]], axis, backend="reference")
    torch.testing.assert_close(y[last].reshape(expected.shape), expected, rtol=2e-2, atol=2e-2)
