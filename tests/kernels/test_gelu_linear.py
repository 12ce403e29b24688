"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for gelu_linear. Test 9 is in tests/test_imports.py."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import native, use_backend
from javis.kernels.ops.gelu_linear.api import gelu_linear
from javis.kernels.ops.gelu_linear.cases import GeluLinearCase
from javis.kernels.testing import assert_within_budget
from tests.kernels.calls import layouts, ops_that_ran, run_on_isa, with_gradients

from .calls import BAD_PRODUCTS

needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
native_op = partial(gelu_linear, backend="cpu")
reference = partial(gelu_linear, backend="reference")
NAMES = ("x", "weight", "bias")
DTYPES = [torch.float32, torch.bfloat16]
BOTH = ["javis_native::bias_gelu", "javis_native::bias_gelu_backward"]
IN_PLACE = ["javis_native::bias_gelu_"]

SHAPES = [
    {"batch": 1, "tokens": 1, "width": 1, "out": 1},
    {"batch": 2, "tokens": 7, "width": 5, "out": 33},
    {"batch": 1, "tokens": 40, "width": 72, "out": 512},
    {"batch": 1, "tokens": 200, "width": 1152, "out": 500},  # the full-size model's sums
]


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> GeluLinearCase:
    return GeluLinearCase(name="test", dtype=dtype, **shape)


def both(function: Any, args: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The result without gradients (in place inside), and the one with them."""
    with torch.no_grad():
        alone = function(*(x.to(dtype or x.dtype) for x in args))
    return with_gradients(function, NAMES, args, dtype=dtype) | {"y without gradients": alone}


# 1. Budget ------------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_forward_and_gradients_are_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    args, _ = case(dtype, **shape).inputs(seed=1)
    exact, same_dtype = both(reference, args, torch.float64), both(reference, args)
    for name, value in both(native_op, args).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_is_within_budget(isa: str) -> None:
    run_on_isa(
        isa,
        "import tests.kernels.test_gelu_linear as t\n"
        "for dtype in t.DTYPES:\n"
        "    for shape in t.SHAPES: t.test_forward_and_gradients_are_within_budget(shape, dtype)\n"
        "t.test_gelu_by_itself()\n",
    )


@needs_native
def test_gelu_by_itself() -> None:
    """The native loops against float64 over all of GELU's bends, and where only one of its tails is left."""
    z = torch.cat((torch.linspace(-12, 12, 9001), torch.tensor([0.0, 1e-30, -1e-30, 40.0, -40.0, 1e4, -1e4]))).view(
        1, -1
    )
    bias = torch.zeros(z.shape[1])
    exact = z.double().requires_grad_()
    y = torch.nn.functional.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(y.sum(), exact)
    ops = torch.ops.javis_native
    for b in (None, bias):
        torch.testing.assert_close(ops.bias_gelu(z, b).double(), y.detach(), rtol=1e-6, atol=3e-7)
        got = ops.bias_gelu_backward(torch.ones_like(z), z, b)
        torch.testing.assert_close(got.double(), slope, rtol=2e-6, atol=3e-7)
    low = z.bfloat16()
    assert torch.equal(ops.bias_gelu(low, bias), ops.bias_gelu(low.float(), bias).bfloat16())
    assert torch.equal(ops.bias_gelu(z, z[0]), ops.bias_gelu(2 * z, None))
    inside = z.clone()
    ops.bias_gelu_(inside, bias)
    assert torch.equal(inside, ops.bias_gelu(z, bias))


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_come_through(dtype: torch.dtype, backend: str) -> None:
    x = torch.tensor([[[0.5], [float("nan")], [float("inf")], [-0.5]]], dtype=dtype)
    weight, bias = torch.tensor([[2.0], [1.0]], dtype=dtype), torch.zeros(2, dtype=dtype)
    y = gelu_linear(x, weight, bias, backend=backend)[0]
    assert y[[0, 3]].isfinite().all()
    assert y[1].isnan().all()
    assert (y[2] == float("inf")).all()
    assert gelu_linear(x[:, :1], weight, bias.fill_(float("nan")), backend=backend).isnan().all()


@needs_native
def test_result_does_not_depend_on_threads() -> None:
    z, dy = torch.randn(2, 300, 65, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ops = torch.ops.javis_native
            results.append(torch.stack((ops.bias_gelu(z, None), ops.bias_gelu_backward(dy, z, None))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# 2. to 4. Layouts, empty batches, registration ------------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("poison")
def test_non_contiguous_inputs_give_the_same() -> None:
    (x, weight, bias), _ = case(batch=2, tokens=5, width=6, out=9).inputs()
    expected = both(native_op, (x, weight, bias))
    transposed = weight.t().contiguous().t()
    strided = torch.stack((bias, bias), dim=1)[:, 0]
    for name, layout in layouts(x).items():
        for key, value in both(native_op, (layout, transposed, strided)).items():
            torch.testing.assert_close(value, expected[key], msg=lambda m, name=name, key=key: f"{name} {key}: {m}")


@needs_native
def test_inputs_are_not_written() -> None:
    args, _ = case(batch=2, tokens=5, width=6, out=9).inputs()
    before = [x.clone() for x in args]
    both(native_op, args)
    for now, then in zip(args, before, strict=True):
        assert torch.equal(now, then)


@needs_native
def test_no_bias_and_frozen_weights() -> None:
    (x, weight, _), _ = case(tokens=5, width=6, out=9).inputs()
    torch.testing.assert_close(native_op(x, weight, None), reference(x, weight, None))
    x.requires_grad_()
    for b in (None, torch.ones(9)):
        (dx,) = torch.autograd.grad(native_op(x, weight, b).sum(), x)  # sum() hands back a dy of stride 0
        torch.testing.assert_close(dx, torch.autograd.grad(reference(x, weight, b).sum(), x)[0])


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
def test_nothing_to_do(batch: int, tokens: int, backend: str) -> None:
    args, _ = case(batch=batch, tokens=tokens, width=4, out=6).inputs()
    results = both(partial(gelu_linear, backend=backend), args)
    assert results["y"].shape == results["y without gradients"].shape == (batch, tokens, 6)
    assert torch.equal(results["dweight"], torch.zeros(6, 4))


@needs_native
def test_opcheck() -> None:
    ops, z = torch.ops.javis_native, torch.randn(5, 9)
    tests = ("test_schema", "test_faketensor")  # gradients go through the autograd.Function, not through the op
    for bias in (None, torch.randn(9)):
        for op, args in (
            (ops.bias_gelu, (z, bias)),
            (ops.bias_gelu_, (z.clone(), bias)),
            (ops.bias_gelu_backward, (z, z, bias)),
            (ops.bias_gelu_backward, (z.t().contiguous().t(), z, bias)),
        ):
            torch.library.opcheck(op.default, args, test_utils=tests)


@needs_native
def test_native_op_refuses_what_the_api_never_sends() -> None:
    op, z = torch.ops.javis_native.bias_gelu, torch.zeros(3, 8)
    for args, message in (
        ((z[0], None), "expected 2"),
        ((z.double(), None), "float32 or bfloat16"),
        ((z.t(), None), "z must be contiguous"),
        ((z, torch.zeros(7)), "bias has size 7"),
        ((z, torch.zeros(8).double()), "wrong dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args)


# 5. torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiles_to_one_graph(dtype: torch.dtype) -> None:
    """float64 takes the reference, float32 the native pass where it is built."""
    torch.compiler.reset()
    args, _ = case(dtype, batch=2, tokens=5, width=6, out=9).inputs()
    compiled = torch.compile(gelu_linear, fullgraph=True, backend="aot_eager")
    actual = both(compiled, args)
    for name, value in both(gelu_linear, args).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")
    uses_native = native.WHY_NOT is None and dtype != torch.float64
    assert ops_that_ran(lambda: with_gradients(compiled, NAMES, args)) == (BOTH if uses_native else [])
    with torch.no_grad():
        assert ops_that_ran(lambda: compiled(*args)) == (IN_PLACE if uses_native else [])


# 6. and 7. The choice -------------------------------------------------------------------------------------------------


@needs_native
def test_the_named_backend_is_the_one_that_runs() -> None:
    args, _ = case(tokens=3, width=4, out=5).inputs()
    for function, ran, alone in ((native_op, BOTH, IN_PLACE), (gelu_linear, BOTH, IN_PLACE), (reference, [], [])):
        assert ops_that_ran(lambda f=function: with_gradients(f, NAMES, args)) == ran
        assert ops_that_ran(lambda f=function: f(*args)) == alone
    with use_backend("reference"):
        assert ops_that_ran(lambda: gelu_linear(*args)) == []
        assert ops_that_ran(lambda: native_op(*args)) == IN_PLACE
    with torch.autocast("cpu", torch.bfloat16):
        assert gelu_linear(*args).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("backend", "dtype", "why"),
    [
        ("cpu", torch.float64, "float64|not built"),
        ("cpu", torch.float16, "float16|not built"),
        ("triton", torch.float32, "no such implementation"),
        ("sdpa", torch.float32, "no such implementation"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, why: str) -> None:
    args, _ = case(dtype, tokens=2, width=4, out=3).inputs()
    with pytest.raises(UsageError, match=why):
        gelu_linear(*args, backend=backend)
    if "no such implementation" not in why:  # a default that an op does not have leaves it at auto
        with use_backend(backend), pytest.raises(UsageError, match=why):
            gelu_linear(*args)
    assert gelu_linear(*args).dtype == dtype


# 8. The reference -----------------------------------------------------------------------------------------------------


def test_reference_gradients() -> None:
    args, _ = case(torch.float64, batch=2, tokens=3, width=4, out=5).inputs()
    assert torch.autograd.gradcheck(reference, [x.requires_grad_() for x in args])


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
def test_case_by_hand(backend: str) -> None:
    """z = 2 * 3 - 5 = 1 and 0: gelu(1) = (1 + tanh(sqrt(2/pi) 1.044715)) / 2, gelu(0) = 0."""
    x, weight, bias = torch.tensor([[[2.0, 1.0]]]), torch.tensor([[3.0, -5.0], [1.0, -2.0]]), torch.zeros(2)
    expected = (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715)) / 2
    y = gelu_linear(x, weight, bias, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[[expected, 0.0]]]), rtol=1e-6, atol=0)


@BAD_PRODUCTS
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 2, 4),
        "weight": torch.zeros(3, 4),
        "bias": torch.zeros(3),
    } | change
    for backend in ("auto", "cpu", "reference"):
        with pytest.raises(ValueError, match=message):
            gelu_linear(**arguments, backend=backend)
