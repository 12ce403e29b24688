"""The numbers of gated_residual_ada_layer_norm: tests 1, 8 and 10 of an op (CONTRIBUTING.md, "Adding an op").

The Triton kernel runs in Triton's interpreter where there is no GPU. The other tests are in
test_gated_residual_ada_layer_norm_calls.py, test 9 in tests/test_imports.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.kernels import gated_residual_ada_layer_norm as op
from javis.kernels import native, triton_support
from javis.kernels.ops.gated_residual_ada_layer_norm.cases import GatedResidualAdaLayerNormCase
from javis.kernels.testing import assert_within_budget
from javis.model.ops import ModelOps
from tests.kernels.calls import run_on_isa

pytestmark = pytest.mark.usefixtures("several_rows_per_program")
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
needs_triton = pytest.mark.skipif(not triton_support.HAS_TRITON, reason="triton is not installed")
BACKENDS = [pytest.param("cpu", marks=needs_native), pytest.param("triton", marks=needs_triton)]
every_kernel = pytest.mark.parametrize("backend", BACKENDS)
reference = partial(op, backend="reference")
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ["x", "h", "gate", "shift", "scale"]

SMALL = [
    {"batch": 1, "frames": 1, "places": 1, "width": 3},
    {"batch": 2, "frames": 1, "places": 5, "width": 33, "gated": False},
    {"batch": 2, "frames": 3, "places": 3, "width": 24, "masked": True},
    {"batch": 1, "frames": 2, "places": 3, "width": 20, "masked": True, "gated": False},
]
# Vectors and their rest; more rows than one block of the gradient sums.
LARGE = [
    {"batch": 2, "frames": 3, "places": 129, "width": 50, "masked": True},
    {"batch": 1, "frames": 9, "places": 40, "width": 1152},
]


def shape_id(shape: dict[str, Any]) -> str:
    return "x".join(str(value) for value in shape.values())


def inputs(
    dtype: torch.dtype = torch.float32, device: str = "cpu", **shape: Any
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    return GatedResidualAdaLayerNormCase(name="test", dtype=dtype, **shape).inputs(seed=1, device=device)


def device_of(backend: str) -> str:
    return TRITON_DEVICE if backend == "triton" else "cpu"


def with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Both outputs and the gradients of every floating-point input, for one fixed dr and dy."""
    leaves: dict[str, Any] = {}
    for name, value in zip([*NAMES, *kwargs], [*args, *kwargs.values()], strict=True):
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(dtype or value.dtype).requires_grad_()
        leaves[name] = value
    r, y = function(*(leaves[name] for name in NAMES), **{name: leaves[name] for name in kwargs})
    generator = torch.Generator().manual_seed(7)
    dr, dy = (torch.randn(r.shape, generator=generator).to(r.device, args[0].dtype).to(r.dtype) for _ in range(2))
    wanted = [name for name, value in leaves.items() if isinstance(value, Tensor) and value.requires_grad]
    gradients = torch.autograd.grad((r, y), [leaves[name] for name in wanted], (dr, dy))
    return {"r": r.detach(), "y": y.detach()} | {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}


def check_budget(backend: str, shape: dict[str, Any], dtype: torch.dtype) -> None:
    args, kwargs = inputs(dtype, device_of(backend), **shape)
    actual = with_gradients(partial(op, backend=backend), args, kwargs)
    exact = with_gradients(reference, args, kwargs, torch.float64)
    same_dtype = with_gradients(reference, args, kwargs)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


# 1. Budget --------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=shape_id)
def test_native_is_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    check_budget("cpu", shape, dtype)


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, dtype) for shape in SMALL[1:] for dtype in DTYPES), (SMALL[2], torch.float16)],
    ids=lambda value: shape_id(value) if isinstance(value, dict) else str(value),
)
def test_triton_is_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    check_budget("triton", shape, dtype)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_is_within_budget(isa: str) -> None:
    """Runs the copies of the loops that this machine would not choose, in a process of their own."""
    run_on_isa(
        isa,
        "import tests.kernels.test_gated_residual_ada_layer_norm as t\n"
        "for dtype in t.DTYPES:\n"
        "    for shape in t.SMALL + t.LARGE: t.check_budget('cpu', shape, dtype)\n",
    )


@every_kernel
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_the_default_op_of_the_model(backend: str, masked: bool) -> None:
    shape = {"batch": 2, "frames": 2, "places": 2, "width": 24, "masked": masked}
    args, kwargs = inputs(torch.bfloat16, device_of(backend), **shape)
    exact = with_gradients(reference, args, kwargs, torch.float64)
    default = with_gradients(ModelOps().gated_residual_ada_layer_norm, args, kwargs)
    for name, value in with_gradients(partial(op, backend=backend), args, kwargs).items():
        assert_within_budget(name, value, exact[name], default[name])


@every_kernel
def test_y_belongs_to_the_rounded_r(backend: str) -> None:
    """The norm of what is returned as r, in float32, rounded to nearest: bit by bit."""
    from javis.kernels import ada_layer_norm

    args, _ = inputs(torch.bfloat16, device_of(backend), batch=1, frames=1, places=3, width=72)
    r, y = op(*args, backend=backend)
    x, h, gate, shift, scale = (value.double() for value in args)
    assert torch.equal(r, (x + gate[:, None] * h).float().bfloat16())
    expected = ada_layer_norm(r.float(), shift.float(), scale.float(), backend=backend).bfloat16()
    assert torch.equal(y, expected)


@every_kernel
def test_nan_and_infinity_come_through(backend: str) -> None:
    args, _ = inputs(torch.bfloat16, device_of(backend), batch=1, frames=1, places=3, width=40)
    args[1][0, 1, 5] = float("nan")
    args[0][0, 2, 5] = float("inf")
    r, y = op(*args, backend=backend)
    assert r[0, 0].isfinite().all() and y[0, 0].isfinite().all()
    assert r[0, 1].isnan().sum() == 1 and y[0, 1].isnan().all()
    assert r[0, 2].isinf().sum() == 1 and not y[0, 2].isfinite().any()


@needs_native
def test_result_does_not_depend_on_threads() -> None:
    args, kwargs = inputs(batch=2, frames=3, places=100, width=48, masked=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(partial(op, backend="cpu"), args, kwargs))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


@every_kernel
def test_only_one_output_used(backend: str) -> None:
    """dy or dr is missing: it counts as zero."""
    args, _ = inputs(torch.float32, device_of(backend), batch=1, frames=1, places=2, width=16)
    for which in (0, 1):
        gradients = []
        for name in (backend, "reference"):
            leaves = [value.clone().requires_grad_() for value in args]
            output = op(*leaves, backend=name)[which]
            gradients.append(torch.autograd.grad(output.square().sum(), leaves, allow_unused=True))
        for ours, expected in zip(*gradients, strict=True):
            expected = torch.zeros_like(ours) if expected is None else expected
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# 8. The reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_reference_gradients(masked: bool) -> None:
    args, kwargs = inputs(torch.float64, batch=2, frames=2, places=1, width=4, masked=masked)
    mask = kwargs.pop("frame_mask", None)
    leaves = [t.requires_grad_() for t in (*args, *kwargs.values())]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return reference(*values[:5], **dict(zip(kwargs, values[5:], strict=True)), frame_mask=mask)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_case_by_hand(backend: str) -> None:
    """r = (0, 1) + (1, 2) * (1, 1) = (1, 3): mean 2, variance 1, so xhat is (-1, 1) with eps 0."""
    device = device_of(backend)
    x, h = torch.tensor([[[0.0, 1.0]]], device=device), torch.ones(1, 1, 2, device=device)
    gate, shift, scale = (torch.tensor([v], device=device) for v in ([1.0, 2.0], [10.0, 20.0], [1.0, 2.0]))
    r, y = op(x, h, gate, shift, scale, eps=0.0, backend=backend)
    torch.testing.assert_close(r.cpu(), torch.tensor([[[1.0, 3.0]]]), rtol=0, atol=0)
    torch.testing.assert_close(y.cpu(), torch.tensor([[[8.0, 23.0]]]), rtol=0, atol=1e-6)
    r, _ = op(x, h, None, shift, scale, eps=0.0, backend=backend)
    torch.testing.assert_close(r.cpu(), torch.tensor([[[1.0, 2.0]]]), rtol=0, atol=0)


# 10. On a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offsets_beyond_31_bits() -> None:
    """A view whose last row starts beyond 2^31 elements, against the same rows side by side."""
    places, width = 2**16 + 1, 2**15 + 64
    if torch.cuda.mem_get_info()[0] < 2 * places * width + (1 << 30):
        pytest.skip("needs 5 GiB of free GPU memory")
    wide = torch.zeros(1, places, width, dtype=torch.bfloat16, device="cuda")
    ends = wide[:, :: places - 1, -64:]
    ends.copy_(torch.randn(ends.shape, device="cuda"))
    zero = torch.zeros(1, 64, device="cuda")
    apart, dense = (op(t, t, None, zero, zero, backend="triton") for t in (ends, ends.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(apart, dense, strict=True))
