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
from javis.kernels import native, use_backend
from javis.kernels.ops.qk_norm_rope.api import prepare, qk_norm_rope
from javis.kernels.ops.qk_norm_rope.cases import QkNormRopeCase
from javis.kernels.testing import assert_within_budget
from javis.kernels.triton_support import HAS_TRITON
from javis.model.ops import apply_rope
from tests.kernels.calls import ops_that_ran, run_on_isa

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
triton_op = partial(qk_norm_rope, backend="triton")
native_op = partial(qk_norm_rope, backend="cpu")
reference = partial(qk_norm_rope, backend="reference")
DTYPES = [torch.float32, torch.bfloat16]
BOTH = {
    "triton": ["javis::qk_norm_rope", "javis::qk_norm_rope_backward"],
    "cpu": ["javis_native::qk_norm_rope", "javis_native::qk_norm_rope_backward"],
}
AUTO = "cpu" if native.WHY_NOT is None else "reference"
KERNELS = [pytest.param("triton", marks=needs_triton), pytest.param("cpu", marks=needs_native)]
EVERY = ["reference", *KERNELS]

# One row; a head in one padded tile (6), in two (72, 24); more rows (96) than one program has; without norm, rotation.
SHAPES: list[dict[str, Any]] = [
    {"axis": "temporal", "batch": 1, "frames": 1, "places": 1, "heads": 1, "size": 6, "rope": True},
    {"axis": "temporal", "batch": 2, "frames": 3, "places": 4, "heads": 2, "size": 72, "rope": True},
    {"axis": "spatial", "batch": 2, "frames": 2, "places": 8, "heads": 3, "size": 24},
    {"axis": "spatial", "batch": 1, "frames": 2, "places": 3, "heads": 1, "size": 16, "norm": False, "rope": True},
]
# For the native kernel: several blocks of 64 tokens, of which the last is not full; heads of an odd size; the widest.
NATIVE_SHAPES: list[dict[str, Any]] = [
    {"axis": "spatial", "batch": 2, "frames": 3, "places": 25, "heads": 2, "size": 72},
    {"axis": "temporal", "batch": 1, "frames": 3, "places": 2, "heads": 2, "size": 7},
    {"axis": "spatial", "batch": 1, "frames": 1, "places": 2, "heads": 1, "size": 256, "rope": True},
    {"axis": "spatial", "batch": 1, "frames": 2, "places": 512, "heads": 16, "size": 72},  # long sums for the weights
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


def hold_to_the_budget(backend: str, shape: dict[str, Any], dtype: torch.dtype) -> None:
    made = case(dtype, **shape)
    exact, same_dtype = results(reference, made, torch.float64), results(reference, made)
    for name, value in results(partial(qk_norm_rope, backend=backend), made).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_is_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    hold_to_the_budget("triton", shape, dtype)


@needs_native
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *NATIVE_SHAPES], ids=lambda s: "-".join(map(str, s.values())))
def test_native_is_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    hold_to_the_budget("cpu", shape, dtype)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_is_within_budget(isa: str) -> None:
    run_on_isa(
        isa,
        "import tests.kernels.test_qk_norm_rope as t\n"
        "for dtype in t.DTYPES:\n"
        "    for shape in (*t.SHAPES, *t.NATIVE_SHAPES): t.hold_to_the_budget('cpu', shape, dtype)\n",
    )


@needs_native
def test_result_does_not_depend_on_threads() -> None:
    """More tokens than two blocks, so that the sums for the weights go through both stages."""
    made = case(axis="temporal", batch=2, frames=5, places=15, heads=2, size=10, rope=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(native_op, made))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        assert torch.equal(value, found[2][name]), name


@pytest.mark.parametrize("backend", EVERY)
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


@pytest.mark.parametrize("backend", EVERY)
def test_nan_stays_in_its_row(backend: str) -> None:
    (qkv, axis), kwargs = case(frames=1, places=3, heads=2, size=8).inputs()
    qkv[0, 0, 1, 0, 1, 3] = float("nan")
    q, k, _ = qk_norm_rope(qkv, axis, **kwargs, backend=backend)
    assert q[0, 1, 1].isnan().all()
    assert int(q.isnan().sum()) == 8
    assert k.isfinite().all()


# 2. to 4. Layouts, empty batches, registration ------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_non_contiguous_inputs_give_the_same(axis: str, backend: str) -> None:
    function = partial(qk_norm_rope, backend=backend)
    (qkv, _), kwargs = case(axis=axis, batch=2, frames=2, places=3, heads=2, size=16, rope=True).inputs()
    wide = torch.full((2, 2, 3, 3, 5, 16), float("nan"))
    wide[:, :, :, :, 1:4:2] = qkv
    expected = run(function, qkv, axis, kwargs)
    for name, layout in {
        "heads of a wider tensor": wide[:, :, :, :, 1:4:2],
        "places first": qkv.transpose(1, 2).contiguous().transpose(1, 2),
        "values first": qkv.transpose(3, 5).contiguous().transpose(3, 5),
        "offset by one value": torch.cat((torch.zeros(1), qkv.flatten()))[1:].view(qkv.shape),
    }.items():
        for key, value in run(function, layout, axis, kwargs).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert wide[:, :, :, :, ::2].isnan().all()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
def test_nothing_to_do(backend: str, sizes: tuple[int, int, int]) -> None:
    weights = {"q_weight": torch.ones(8), "k_weight": torch.ones(8)}
    found = run(partial(qk_norm_rope, backend=backend), torch.zeros(*sizes, 3, 2, 8), "spatial", weights)
    assert found["q"].shape == (sizes[0] * sizes[1], sizes[2], 2, 8)
    assert torch.equal(found["dq_weight"], torch.zeros(8))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_opcheck(permuted: bool, bare: bool, backend: str) -> None:
    ops = torch.ops.javis_native if backend == "cpu" else torch.ops.javis
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


@needs_native
def test_native_op_refuses_what_the_api_never_sends() -> None:
    q, weights, table = torch.zeros(1, 2, 3, 2, 8), torch.ones(2, 8), torch.zeros(3, 4)
    wrong = {
        "expected 5": (q[0], q[0], None, None, None),
        "float32 or bfloat16": (q.double(), q.double(), None, None, None),
        "heads of 300 values": (q.new_zeros(1, 1, 1, 1, 300), q.new_zeros(1, 1, 1, 1, 300), None, None, None),
        "k has size": (q, q[:, :1], None, None, None),
        "k has the wrong dtype": (q, q.bfloat16(), None, None, None),
        "weights has size": (q, q, weights[:, :7], None, None),
        "weights must be contiguous": (q, q, weights.t().contiguous().t(), None, None),
        "both of cos and sin": (q, q, None, table, None),
        "sin has size": (q, q, None, table, table[:2]),
        "cos has the wrong dtype": (q, q, None, table.double(), table),
        "heads of an even size": (q[..., :7], q[..., :7], None, table, table),
    }
    for message, args in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.javis_native.qk_norm_rope(*args, 1e-6)
    with pytest.raises(RuntimeError, match="dk has size"):
        torch.ops.javis_native.qk_norm_rope_backward(q[0], q[0, :, :2], q, q, weights, None, None, 1e-6)


# 5. torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", *EVERY])
def test_compiles_to_one_graph(backend: str) -> None:
    torch.compiler.reset()
    made = case(axis="temporal", batch=1, frames=2, places=2, heads=1, size=8, rope=True)
    function = partial(qk_norm_rope, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = results(function, made), {}
    ran = ops_that_ran(lambda: found.update(results(compiled, made)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")
    assert ran == BOTH.get(AUTO if backend == "auto" else backend, [])


# 6. and 7. The choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EVERY)
def test_the_named_backend_is_the_one_that_runs(backend: str) -> None:
    made = case(frames=1, places=2, heads=1, size=8)
    ran = BOTH.get(backend, [])
    assert ops_that_ran(lambda: results(partial(qk_norm_rope, backend=backend), made)) == ran
    with use_backend(backend):
        assert ops_that_ran(lambda: results(qk_norm_rope, made)) == ran
    assert ops_that_ran(lambda: results(qk_norm_rope, made)) == BOTH.get(AUTO, [])  # auto never interprets


def test_attention_of_a_library_is_prepared_whatever_the_default() -> None:
    (qkv, axis), kwargs = case(frames=1, places=2, heads=1, size=8, rope=True).inputs()
    with use_backend("cuda"):
        with pytest.raises(UsageError, match="no CUDA kernel"):
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
        ("cpu", torch.float64, 8, "float64|not built"),
        ("cpu", torch.float16, 8, "float16|not built"),
        ("cpu", torch.float32, 258, "at most 256|not built"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, size: int, why: str) -> None:
    (qkv, axis), _ = case(dtype, frames=1, places=2, heads=1, size=size).inputs()
    with pytest.raises(UsageError, match=why):
        qk_norm_rope(qkv, axis, backend=backend)
    if "no such implementation" not in why:  # a default that an op does not have leaves it at auto
        with use_backend(backend), pytest.raises(UsageError, match=why):
            qk_norm_rope(qkv, axis)


@needs_native
def test_other_reasons_of_the_native_kernel() -> None:
    (qkv, axis), kwargs = case(frames=1, places=2, heads=1, size=8, rope=True).inputs()
    wide = kwargs | {"q_weight": kwargs["q_weight"].double()}
    with pytest.raises(UsageError, match="round to float32"):
        native_op(qkv, axis, **wide)
    meta = torch.empty(1, 1, 2, 3, 1, 8, device="meta")
    with pytest.raises(UsageError, match="needs CPU tensors, qkv is on meta"):
        native_op(meta, axis)


# 8. The reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_reference_gradients(axis: str) -> None:
    (qkv, _), kwargs = case(torch.float64, axis=axis, frames=2, places=2, heads=1, size=4, rope=True).inputs()
    leaves = [t.requires_grad_() for t in (qkv, kwargs["q_weight"], kwargs["k_weight"])]
    assert torch.autograd.gradcheck(
        lambda x, q, k: reference(x, axis, q_weight=q, k_weight=k, rope=kwargs["rope"]), leaves
    )


@pytest.mark.parametrize("backend", EVERY)
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
