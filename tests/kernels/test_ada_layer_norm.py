"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for ada_layer_norm. Test 9 is in tests/test_imports.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import ada_layer_norm, native, use_backend
from javis.kernels.ops.ada_layer_norm.cases import AdaLayerNormCase
from javis.kernels.testing import assert_within_budget
from javis.model.ops import ModelOps
from tests.kernels.calls import run_on_isa

needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
native_op = partial(ada_layer_norm, backend="cpu")
reference = partial(ada_layer_norm, backend="reference")
DTYPES = [torch.float32, torch.bfloat16]

# T = 1, odd T, widths that are no power of two or below one vector, more rows than one block of the gradient sums.
SHAPES = [
    {"batch": 1, "frames": 1, "places": 1, "width": 3},
    {"batch": 2, "frames": 1, "places": 7, "width": 33},
    {"batch": 3, "frames": 5, "places": 3, "width": 72, "masked": True},
    {"batch": 2, "frames": 3, "places": 129, "width": 50, "masked": True},
    {"batch": 1, "frames": 9, "places": 40, "width": 1152},
]


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> AdaLayerNormCase:
    return AdaLayerNormCase(name="test", dtype=dtype, **shape)


def with_gradients(
    function: Callable[..., Tensor],
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output and gradients of every floating-point input, for one fixed dy."""
    names = ["x", "shift", "scale", *kwargs]
    inputs = {}
    for name, value in zip(names, [*args, *kwargs.values()], strict=True):
        inputs[name] = value.detach().to(dtype or value.dtype).requires_grad_() if value.is_floating_point() else value
    y = function(*list(inputs.values())[:3], **{name: inputs[name] for name in kwargs})
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(args[0].dtype).to(y.dtype)
    wanted = [name for name, value in inputs.items() if value.requires_grad]
    gradients = torch.autograd.grad(y, [inputs[name] for name in wanted], dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def ops_that_ran(function: Callable[[], object]) -> list[str]:
    """Names of the native ops that PyTorch's profiler saw, in compiled code too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sorted(event.key for event in profile.key_averages() if event.key.startswith("javis_native::"))


# 1. Budget --------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_forward_and_gradients_are_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    args, kwargs = case(dtype, **shape).inputs(seed=1)
    actual = with_gradients(native_op, args, kwargs)
    exact = with_gradients(reference, args, kwargs, torch.float64)
    same_dtype = with_gradients(reference, args, kwargs)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_is_within_budget(isa: str) -> None:
    """Runs the copies of the loops that this machine would not choose, in a process of their own."""
    run_on_isa(
        isa,
        "import tests.kernels.test_ada_layer_norm as t\n"
        "for dtype in t.DTYPES:\n"
        "    for shape in t.SHAPES: t.test_forward_and_gradients_are_within_budget(shape, dtype)\n",
    )


@needs_native
def test_large_mean_does_not_cancel() -> None:
    x = torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(0)) + 3000
    zero = torch.zeros(1, 256)
    exact = reference(x.double(), zero.double(), zero.double())
    assert_within_budget("y", native_op(x, zero, zero), exact, reference(x, zero, zero))


@needs_native
def test_bfloat16_rounds_to_nearest() -> None:
    """The budget allows a truncated last bit; this does not: same loops in float32, rounded by PyTorch."""
    args, kwargs = case(torch.bfloat16, batch=2, frames=3, places=5, width=72, masked=True).inputs()
    wide = {name: value.float() if value.is_floating_point() else value for name, value in kwargs.items()}
    expected = native_op(*(value.float() for value in args), **wide).bfloat16()
    assert torch.equal(native_op(*args, **kwargs), expected)


@needs_native
def test_infinity_and_nan_come_through() -> None:
    args, _ = case(torch.bfloat16, batch=1, frames=1, places=3, width=40).inputs()
    args[0][0, 1, 5] = float("nan")
    args[0][0, 2, 5] = float("inf")
    y = native_op(*args)
    assert y[0, 0].isfinite().all()
    assert y[0, 1].isnan().all()
    assert not y[0, 2].isfinite().any()
    # A NaN whose bits are all ones would turn into a zero if it were rounded like a number.
    shift = torch.full((1, 40), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert native_op(args[0], shift, args[2]).isnan().all()


@needs_native
def test_result_does_not_depend_on_threads() -> None:
    args, kwargs = case(batch=2, frames=3, places=200, width=64, masked=True).inputs()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(native_op, args, kwargs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_default_op_of_the_model(dtype: torch.dtype, masked: bool) -> None:
    args, kwargs = case(dtype, batch=2, frames=4, places=9, width=48, masked=masked).inputs()
    exact = with_gradients(reference, args, kwargs, torch.float64)
    default = with_gradients(ModelOps().ada_layer_norm, args, kwargs)
    for name, value in with_gradients(native_op, args, kwargs).items():
        assert_within_budget(name, value, exact[name], default[name])


@needs_native
def test_modulation_may_have_another_dtype() -> None:
    (x, shift, scale), _ = case(torch.bfloat16, batch=2, frames=2, places=3, width=40).inputs()
    shift, scale = shift.float().requires_grad_(), scale.float().requires_grad_()
    y = native_op(x, shift, scale)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert shift.grad is not None
    assert shift.grad.dtype == torch.float32
    assert torch.equal(shift.grad, torch.full((2, 40), 6.0))  # d(sum y)/dshift counts the tokens


# 2. to 4. Layouts, empty batches, registration ---------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_inputs_give_the_same(dtype: torch.dtype) -> None:
    (x, shift, scale), kwargs = case(dtype, batch=2, frames=3, places=5, width=24, masked=True).inputs()
    wide = torch.full((2, 15, 60), float("nan"), dtype=dtype)
    wide[:, :, 12:36] = x
    layouts = {
        "columns of a wider tensor": wide[:, :, 12:36],
        "tokens first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "broadcast over the batch": x[:1].expand(2, -1, -1),
    }
    modulation = torch.stack((scale, shift), dim=-1).unbind(-1)  # strided, as chunks of one projection are
    mask = {"frame_mask": kwargs["frame_mask"].t().contiguous().t()}
    for name, layout in layouts.items():
        assert not layout.is_contiguous(), name
        expected = with_gradients(native_op, (layout.contiguous(), shift, scale), kwargs)
        actual = with_gradients(native_op, (layout, modulation[1], modulation[0]), kwargs | mask)
        for key, value in actual.items():
            assert torch.equal(value, expected[key]), (name, key)


@needs_native
def test_broadcast_gradient() -> None:
    args, _ = case(batch=2, frames=1, places=6, width=20).inputs()
    leaves = [a.clone().requires_grad_() for a in args]
    got = torch.autograd.grad(native_op(*leaves).sum(), leaves)  # sum() hands back a dy of stride 0
    dense = torch.autograd.grad(native_op(*leaves), leaves, torch.ones(2, 6, 20))
    for a, b in zip(got, dense, strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize(("batch", "frames", "places"), [(0, 3, 4), (2, 3, 0)])
def test_nothing_to_do(batch: int, frames: int, places: int) -> None:
    args, kwargs = case(batch=batch, frames=frames, places=places, width=16, masked=True).inputs()
    results = with_gradients(native_op, args, kwargs)
    assert results["y"].shape == (batch, frames * places, 16)
    assert results["dx"].shape == (batch, frames * places, 16)
    assert torch.equal(results["dshift"], torch.zeros(batch, 16))


@needs_native
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(masked: bool, permuted: bool) -> None:
    (x, shift, scale), kwargs = case(batch=2, frames=3, places=5, width=24, masked=masked).inputs()
    dy = torch.randn_like(x)
    if permuted:
        x, dy = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, dy))
    shift0, scale0, mask = (kwargs.get(name) for name in ("shift0", "scale0", "frame_mask"))
    ops = torch.ops.javis_native
    tests = ("test_schema", "test_faketensor")  # gradients go through the autograd.Function, not through the op
    torch.library.opcheck(ops.ada_layer_norm.default, (x, shift, scale, shift0, scale0, mask, 1e-6), test_utils=tests)
    _, mean, rstd = ops.ada_layer_norm(x, shift, scale, shift0, scale0, mask, 1e-6)
    args = (dy, x, mean, rstd, scale, scale0, mask)
    torch.library.opcheck(ops.ada_layer_norm_backward.default, args, test_utils=tests)


@needs_native
def test_native_op_refuses_what_the_api_never_sends() -> None:
    op = torch.ops.javis_native.ada_layer_norm
    x, vector = torch.zeros(2, 6, 8), torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match="shift has size 7"):
        op(x, torch.zeros(2, 7), vector, None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="wrong dtype"):
        op(x, vector.bfloat16(), vector, None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="does not divide"):
        op(x, vector, vector, vector, vector, torch.ones(2, 4, dtype=torch.bool), 1e-6)
    with pytest.raises(RuntimeError, match="needs shift0"):
        op(x, vector, vector, None, None, torch.ones(2, 3, dtype=torch.bool), 1e-6)


# 5. torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_compiles_to_one_graph(dtype: torch.dtype, masked: bool) -> None:
    """float64 takes the reference, the others the native op where it is built."""
    torch.compiler.reset()
    args, kwargs = case(dtype, batch=2, frames=3, places=5, width=24, masked=masked).inputs()
    # aot_eager traces forward and backward through the fakes like the default backend, without compiling C++ loops.
    compiled = torch.compile(ada_layer_norm, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, args, kwargs)
    for name, value in with_gradients(ada_layer_norm, args, kwargs).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")
    ran = ops_that_ran(lambda: with_gradients(compiled, args, kwargs))
    uses_native = native.WHY_NOT is None and dtype != torch.float64
    assert len(ran) == (2 if uses_native else 0), ran


@needs_native
def test_compiled_code_follows_use_backend() -> None:
    torch.compiler.reset()
    args, _ = case(batch=1, frames=1, places=4, width=16).inputs()
    compiled = torch.compile(ada_layer_norm, fullgraph=True, backend="aot_eager")
    assert ops_that_ran(lambda: compiled(*args))
    with use_backend("reference"):
        assert not ops_that_ran(lambda: compiled(*args))
    assert ops_that_ran(lambda: compiled(*args))


@needs_native
@pytest.mark.slow
def test_compiles_with_the_default_compiler() -> None:
    torch.compiler.reset()
    args, kwargs = case(batch=2, frames=3, places=5, width=24, masked=True).inputs()
    compiled = torch.compile(lambda *a, **k: ada_layer_norm(*a, **k).tanh(), fullgraph=True)
    expected = with_gradients(lambda *a, **k: ada_layer_norm(*a, **k).tanh(), args, kwargs)
    for name, value in with_gradients(compiled, args, kwargs).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


# 6. and 7. The choice ----------------------------------------------------------------------------------------------


@needs_native
def test_the_named_backend_is_the_one_that_runs() -> None:
    args, kwargs = case(batch=1, frames=2, places=3, width=16, masked=True).inputs()
    both = ["javis_native::ada_layer_norm", "javis_native::ada_layer_norm_backward"]
    assert ops_that_ran(lambda: with_gradients(native_op, args, kwargs)) == both
    assert ops_that_ran(lambda: with_gradients(ada_layer_norm, args, kwargs)) == both
    assert ops_that_ran(lambda: with_gradients(reference, args, kwargs)) == []
    with use_backend("reference"):
        assert ops_that_ran(lambda: ada_layer_norm(*args, **kwargs)) == []
        assert ops_that_ran(lambda: native_op(*args, **kwargs)) == both[:1]  # the call's own word counts most


@pytest.mark.parametrize(
    ("backend", "dtype", "why"),
    [
        ("triton", torch.float64, "float64|not installed|needs a CUDA device"),
        ("cuda", torch.float32, "needs CUDA tensors, got one on cpu"),
        ("sdpa", torch.float32, "this op has no such implementation"),
        ("cpu", torch.float64, "float64|not built"),
        ("cpu", torch.float16, "float16|not built"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, why: str) -> None:
    args, _ = case(dtype, batch=1, frames=1, places=2, width=8).inputs()
    with pytest.raises(UsageError, match=why):
        ada_layer_norm(*args, backend=backend)
    if "no such implementation" not in why:  # a default that an op does not have leaves it at auto
        with use_backend(backend), pytest.raises(UsageError, match=why):
            ada_layer_norm(*args)


def test_float16_and_float64_run_under_auto() -> None:
    for dtype in (torch.float16, torch.float64):
        args, _ = case(dtype, batch=1, frames=1, places=2, width=8).inputs()
        assert ada_layer_norm(*args).dtype == dtype


# 8. The reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_reference_gradients(masked: bool) -> None:
    args, kwargs = case(torch.float64, batch=2, frames=2, places=2, width=5, masked=masked).inputs()
    mask = kwargs.pop("frame_mask", None)
    leaves = [t.requires_grad_() for t in (*args, *kwargs.values())]

    def function(x: Tensor, shift: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
        extra = {"shift0": zero[0], "scale0": zero[1], "frame_mask": mask} if zero else {}
        return reference(x, shift, scale, **extra)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_case_by_hand(backend: str) -> None:
    """Rows (1, 3) and (2, -2): means 2 and 0, variances 1 and 4, so xhat is (-1, 1) and (1, -1) with eps 0."""
    x = torch.tensor([[[1.0, 3.0], [2.0, -2.0]]])
    shift, scale = torch.tensor([[10.0, 20.0]]), torch.tensor([[1.0, 2.0]])
    y = ada_layer_norm(x, shift, scale, eps=0.0, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[[8.0, 23.0], [12.0, 17.0]]]), rtol=0, atol=1e-6)
    y = ada_layer_norm(x, shift, scale, eps=3.0, backend=backend)  # standard deviations 2 and sqrt(7)
    torch.testing.assert_close(y[0, 0], torch.tensor([9.0, 21.5]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_mask_takes_the_modulation_frame_by_frame(backend: str) -> None:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
    zero = torch.zeros(2, 8)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    shift, shift0 = torch.full((2, 8), 5.0), torch.full((2, 8), -5.0)
    y = ada_layer_norm(x, shift, zero, shift0=shift0, scale0=zero, frame_mask=mask, backend=backend)
    centre = y.mean(-1).view(2, 3, 2)  # the normalised tokens have mean 0, so the shift remains
    expected = torch.where(mask, 5.0, -5.0)[:, :, None].expand(2, 3, 2)
    torch.testing.assert_close(centre, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, "x must be"),
        ({"x": torch.zeros(2, 6, 8, dtype=torch.long)}, "x must be"),
        ({"shift": torch.zeros(2, 7)}, "shift must be"),
        ({"scale": torch.zeros(1, 8)}, "scale must be"),
        ({"frame_mask": torch.ones(2, 3, dtype=torch.bool)}, "needs shift0"),
        ({"frame_mask": torch.ones(2, 4, dtype=torch.bool), "shift0": 1, "scale0": 1}, "dividing 6"),
        ({"frame_mask": torch.ones(2, 3), "shift0": 1, "scale0": 1}, "bool"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 6, 8), "shift": torch.zeros(2, 8), "scale": torch.zeros(2, 8)}
    arguments |= {name: torch.zeros(2, 8) if isinstance(value, int) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        ada_layer_norm(**arguments)
