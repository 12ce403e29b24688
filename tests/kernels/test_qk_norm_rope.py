"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for qk_norm_rope. Test 9 is in tests/test_imports.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import use_backend
from javis.kernels.ops.qk_norm_rope.api import prepare, qk_norm_rope
from javis.kernels.ops.qk_norm_rope.cases import QkNormRopeCase
from javis.kernels.testing import assert_within_budget
from javis.kernels.triton_support import HAS_TRITON
from javis.model.ops import apply_rope
from tests.kernels.calls import ops_that_ran

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
triton_op = partial(qk_norm_rope, backend="triton")
reference = partial(qk_norm_rope, backend="reference")
DTYPES = [torch.float32, torch.bfloat16]
BOTH = ["javis::qk_norm_rope", "javis::qk_norm_rope_backward"]

# One row; a head in one padded tile (6), in two (72, 24); more rows (96) than one program has; without norm, rotation.
SHAPES: list[dict[str, Any]] = [
    {"axis": "temporal", "batch": 1, "frames": 1, "places": 1, "heads": 1, "size": 6, "rope": True},
    {"axis": "temporal", "batch": 2, "frames": 3, "places": 4, "heads": 2, "size": 72, "rope": True},
    {"axis": "spatial", "batch": 2, "frames": 2, "places": 8, "heads": 3, "size": 24},
    {"axis": "spatial", "batch": 1, "frames": 2, "places": 3, "heads": 1, "size": 16, "norm": False, "rope": True},
]


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> QkNormRopeCase:
    return QkNormRopeCase(name="test", dtype=dtype, **shape)


def run(
    function: Callable[..., tuple[Tensor, ...]],
    qkv: Tensor,
    axis: str,
    kwargs: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """q, k, v and the gradients of qkv and of the weights, for fixed gradients of q, k and v."""
    leaves = {"qkv": qkv} | {name: kwargs[name] for name in ("q_weight", "k_weight") if name in kwargs}
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
    given = {name: x for name, x in leaves.items() if name != "qkv"}
    out = function(leaves["qkv"], axis, **given, rope=kwargs.get("rope"))
    generator = torch.Generator().manual_seed(7)
    dy = [torch.randn(y.shape, generator=generator).to(qkv.dtype).to(y.dtype) for y in out]
    gradients = torch.autograd.grad(out, list(leaves.values()), dy)
    found = {name: y.detach() for name, y in zip("qkv", out, strict=True)}
    return found | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def results(
    function: Callable[..., tuple[Tensor, ...]], made: QkNormRopeCase, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    (qkv, axis), kwargs = made.inputs(seed=1)
    return run(function, qkv, axis, kwargs, dtype)


# 1. Budget ------------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_is_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    made = case(dtype, **shape)
    exact, same_dtype = results(reference, made, torch.float64), results(reference, made)
    for name, value in results(triton_op, made).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_equals_pytorch(axis: str, backend: str) -> None:
    """Against F.rms_norm and the model's own rotation, in the layout that attention libraries take."""
    (qkv, _), kwargs = case(axis=axis, batch=2, frames=3, places=4, heads=2, size=8, rope=True).inputs()
    rows = qkv.transpose(1, 2) if axis == "temporal" else qkv
    q, k, v = qk_norm_rope(qkv, axis, **kwargs, backend=backend)
    for got, part, weight in ((q, 0, kwargs["q_weight"]), (k, 1, kwargs["k_weight"])):
        expected = F.rms_norm(rows[:, :, :, part].flatten(0, 1).transpose(1, 2), (8,), weight, 1e-6)
        torch.testing.assert_close(got.transpose(1, 2), apply_rope(expected, kwargs["rope"]))
    assert torch.equal(v, rows[:, :, :, 2].flatten(0, 1))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_nan_stays_in_its_row(backend: str) -> None:
    (qkv, axis), kwargs = case(frames=1, places=3, heads=2, size=8).inputs()
    qkv[0, 0, 1, 0, 1, 3] = float("nan")
    q, k, _ = qk_norm_rope(qkv, axis, **kwargs, backend=backend)
    assert q[0, 1, 1].isnan().all()
    assert int(q.isnan().sum()) == 8
    assert k.isfinite().all()


# 2. to 4. Layouts, empty batches, registration ------------------------------------------------------------------------


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_non_contiguous_inputs_give_the_same(axis: str) -> None:
    (qkv, _), kwargs = case(axis=axis, batch=2, frames=2, places=3, heads=1, size=16, rope=True).inputs()
    wide = torch.full((2, 2, 3, 3, 3, 16), float("nan"))
    wide[:, :, :, :, 1:2] = qkv
    expected = run(triton_op, qkv, axis, kwargs)
    for name, layout in {
        "heads of a wider tensor": wide[:, :, :, :, 1:2],
        "places first": qkv.transpose(1, 2).contiguous().transpose(1, 2),
        "values first": qkv.transpose(3, 5).contiguous().transpose(3, 5),
        "offset by one value": torch.cat((torch.zeros(1), qkv.flatten()))[1:].view(qkv.shape),
    }.items():
        for key, value in run(triton_op, layout, axis, kwargs).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert wide[:, :, :, :, 0].isnan().all()
    assert wide[:, :, :, :, 2].isnan().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
def test_nothing_to_do(backend: str, sizes: tuple[int, int, int]) -> None:
    weights = {"q_weight": torch.ones(8), "k_weight": torch.ones(8)}
    found = run(partial(qk_norm_rope, backend=backend), torch.zeros(*sizes, 3, 2, 8), "spatial", weights)
    assert found["q"].shape == (sizes[0] * sizes[1], sizes[2], 2, 8)
    assert torch.equal(found["dq_weight"], torch.zeros(8))


@needs_triton
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_opcheck(permuted: bool, bare: bool) -> None:
    ops = torch.ops.javis
    (qkv, _), kwargs = case(batch=1, frames=2, places=3, heads=2, size=8, rope=True).inputs()
    q, k, _ = (qkv.transpose(1, 2).contiguous().transpose(1, 2) if permuted else qkv).unbind(3)
    dq, dk = (torch.randn(2, 3, 2, 8) for _ in range(2))
    if permuted:
        dq, dk = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (dq, dk))
    weights = None if bare else torch.stack((kwargs["q_weight"], kwargs["k_weight"]))
    args = (q, k, weights, *kwargs["rope"], 1e-6)
    tests = ("test_schema", "test_faketensor")  # gradients go through the autograd.Function, not through the op
    torch.library.opcheck(ops.qk_norm_rope.default, args, test_utils=tests)
    torch.library.opcheck(ops.qk_norm_rope_backward.default, (dq, dk, *args), test_utils=tests)


# 5. torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_triton)])
def test_compiles_to_one_graph(backend: str) -> None:
    torch.compiler.reset()
    made = case(axis="temporal", batch=1, frames=2, places=2, heads=1, size=8, rope=True)
    function = partial(qk_norm_rope, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = results(function, made), {}
    ran = ops_that_ran(lambda: found.update(results(compiled, made)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")
    assert ran == (BOTH if backend == "triton" else [])


# 6. and 7. The choice -------------------------------------------------------------------------------------------------


@needs_triton
def test_the_named_backend_is_the_one_that_runs() -> None:
    made = case(frames=1, places=2, heads=1, size=8)
    assert ops_that_ran(lambda: results(triton_op, made)) == BOTH
    assert ops_that_ran(lambda: results(reference, made)) == []
    assert ops_that_ran(lambda: results(qk_norm_rope, made)) == []  # auto never interprets
    with use_backend("triton"):
        assert ops_that_ran(lambda: results(qk_norm_rope, made)) == BOTH


def test_attention_of_a_library_is_prepared_whatever_the_default() -> None:
    (qkv, axis), kwargs = case(frames=1, places=2, heads=1, size=8, rope=True).inputs()
    with use_backend("sdpa"):
        with pytest.raises(UsageError, match="no such implementation"):
            qk_norm_rope(qkv, axis, **kwargs)
        found = prepare(qkv, axis, kwargs["q_weight"], kwargs["k_weight"], kwargs["rope"], 1e-6)
    for got, expected in zip(found, reference(qkv, axis, **kwargs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("backend", "dtype", "size", "why"),
    [
        ("cuda", torch.float32, 8, "no CUDA kernel in this version"),
        ("triton", torch.float64, 8, "float64|not installed"),
        ("triton", torch.float32, 130, "at most 128|not installed"),
        ("cpu", torch.float32, 8, "no such implementation"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, size: int, why: str) -> None:
    (qkv, axis), _ = case(dtype, frames=1, places=2, heads=1, size=size).inputs()
    with pytest.raises(UsageError, match=why):
        qk_norm_rope(qkv, axis, backend=backend)
    with use_backend(backend), pytest.raises(UsageError, match=why):
        qk_norm_rope(qkv, axis)


# 8. The reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_reference_gradients(axis: str) -> None:
    (qkv, _), kwargs = case(torch.float64, axis=axis, frames=2, places=2, heads=1, size=4, rope=True).inputs()
    leaves = [t.requires_grad_() for t in (qkv, kwargs["q_weight"], kwargs["k_weight"])]
    assert torch.autograd.gradcheck(
        lambda x, q, k: reference(x, axis, q_weight=q, k_weight=k, rope=kwargs["rope"]), leaves
    )


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_case_by_hand(backend: str) -> None:
    """q = (3, 4, 0, 0): root mean square 2.5. A quarter turn takes the pair (a, b) to (-b, a)."""
    qkv = torch.zeros(1, 1, 1, 3, 1, 4)
    qkv[0, 0, 0, 0, 0] = torch.tensor([3.0, 4, 0, 0])
    qkv[0, 0, 0, 1, 0] = torch.tensor([0.0, 0, 1, 2])
    weight = torch.tensor([1.0, 2, 3, 4])
    quarter = (torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))  # of the first pair only
    q, k, _ = qk_norm_rope(
        qkv, "spatial", q_weight=weight, k_weight=torch.ones(4), rope=quarter, eps=0.0, backend=backend
    )
    torch.testing.assert_close(q[0, 0, 0], torch.tensor([-3.2, 1.2, 0, 0]))
    root = (5 / 4) ** 0.5
    torch.testing.assert_close(k[0, 0, 0], torch.tensor([0.0, 0, 1 / root, 2 / root]))


# 10. On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of GPU memory")
    places = 2**31 // (3 * 16 * 72) + 8
    qkv = torch.randn(1, 1, places, 3, 16, 72, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(72, device="cuda")
    found = triton_op(qkv, "spatial", q_weight=weight, k_weight=weight)
    expected = reference(qkv[:, :, -4:], "spatial", q_weight=weight, k_weight=weight)
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got[:, -4:], exact, rtol=2e-2, atol=2e-2)
