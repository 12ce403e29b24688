"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for gated_residual_ada_layer_norm on both its kernels.

The Triton kernel runs in Triton's interpreter where there is no GPU. Test 9 is in tests/test_imports.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import gated_residual_ada_layer_norm as op
from javis.kernels import native, triton_support, use_backend
from javis.kernels.ops.gated_residual_ada_layer_norm.cases import GatedResidualAdaLayerNormCase
from javis.kernels.testing import assert_within_budget
from javis.model.ops import ModelOps

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture(autouse=True)
def several_rows_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Triton kernels do on large inputs, on small ones: 4 rows per forward program, 2 per partial sum."""
    if triton_support.HAS_TRITON:
        from javis.kernels.ops.ada_layer_norm import triton_impl

        monkeypatch.setattr(triton_impl, "forward_rows_per_program", lambda tokens: 4)
        monkeypatch.setattr(triton_impl, "backward_rows_per_program", lambda tokens, places: 2)


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
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SMALL[1:], ids=shape_id)
def test_triton_is_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.float16 and shape is not SMALL[2]:
        pytest.skip("one shape is enough for float16")
    check_budget("triton", shape, dtype)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_is_within_budget(isa: str) -> None:
    """Runs the copies of the loops that this machine would not choose, in a process of their own."""
    if isa not in native.build_info().get("instruction_sets", "").split():
        pytest.skip(f"not built for {isa}")
    code = (
        "import sys; from javis.kernels import native\n"
        f"if native.cpu_isa() != {isa!r}: print('not here:', native.cpu_isa()); sys.exit(77)\n"
        "import tests.kernels.test_gated_residual_ada_layer_norm as t\n"
        "for dtype in t.DTYPES:\n"
        "    for shape in t.SMALL + t.LARGE: t.check_budget('cpu', shape, dtype)\n"
    )
    environment = os.environ | {"JAVIS_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 77:
        pytest.skip(f"this processor has no {isa}: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr[-2000:]


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


# 2. to 4. Layouts, empty batches, registration ---------------------------------------------------------------------


@every_kernel
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_gives_the_same_and_nothing_is_written_around_it(backend: str, dtype: torch.dtype) -> None:
    args, kwargs = inputs(dtype, device_of(backend), batch=2, frames=2, places=2, width=16, masked=True)
    run = partial(op, backend=backend)
    expected = with_gradients(run, args, kwargs)
    around = [torch.full((2, 4, 40), float("nan"), dtype=dtype, device=args[0].device) for _ in range(2)]
    for wide, value in zip(around, args[:2], strict=True):
        wide[:, :, 8:24] = value
    before = [wide.clone() for wide in around]
    layouts = {
        "columns of a wider tensor": [wide[:, :, 8:24] for wide in around],
        "h alone": [args[0], around[1][:, :, 8:24]],
        "channels first": [value.transpose(1, 2).contiguous().transpose(1, 2) for value in args[:2]],
    }
    modulation = torch.stack(args[2:], dim=-1).unbind(-1)
    mask = {"frame_mask": kwargs["frame_mask"].t().contiguous().t()}
    for name, layout in layouts.items():
        assert not all(value.is_contiguous() for value in layout), name
        for key, value in with_gradients(run, (*layout, *modulation), kwargs | mask).items():
            assert torch.equal(value, expected[key]), (name, key)
    for wide, old in zip(around, before, strict=True):
        assert torch.equal(wide.nan_to_num(7), old.nan_to_num(7))


@every_kernel
def test_h_and_modulation_of_other_dtypes(backend: str) -> None:
    """As under autocast: the stream in float32, the block's output in bfloat16."""
    (x, h, gate, shift, scale), _ = inputs(torch.float32, device_of(backend), batch=2, frames=1, places=2, width=24)
    mixed = (x, h.bfloat16(), gate.bfloat16(), shift, scale)
    actual = with_gradients(partial(op, backend=backend), mixed, {})
    expected = with_gradients(reference, mixed, {})
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        tolerance = 2.0**-8 if value.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=1e-5, msg=name)


@every_kernel
@pytest.mark.parametrize(("batch", "frames", "places"), [(0, 3, 4), (2, 3, 0)])
def test_nothing_to_do(backend: str, batch: int, frames: int, places: int) -> None:
    args, kwargs = inputs(
        torch.float32, device_of(backend), batch=batch, frames=frames, places=places, width=16, masked=True
    )
    results = with_gradients(partial(op, backend=backend), args, kwargs)
    for name in ("r", "y", "dx", "dh"):
        assert results[name].shape == (batch, frames * places, 16)
    for name in ("dgate", "dshift0"):
        assert torch.equal(results[name], torch.zeros(batch, 16, device=results[name].device))


@every_kernel
@pytest.mark.parametrize(
    ("masked", "gated", "permuted"), [(False, True, False), (True, False, True), (True, True, True)]
)
def test_opcheck(backend: str, masked: bool, gated: bool, permuted: bool) -> None:
    shape = {"batch": 1, "frames": 2, "places": 2, "width": 8, "masked": masked, "gated": gated}
    (x, h, gate, shift, scale), kwargs = inputs(torch.float32, device_of(backend), **shape)
    dr, dy = torch.randn_like(x), torch.randn_like(x)
    if permuted:
        x, h, dr, dy = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, h, dr, dy))
    gate0, shift0, scale0, mask = (kwargs.get(name) for name in ("gate0", "shift0", "scale0", "frame_mask"))
    ops = torch.ops.javis if backend == "triton" else torch.ops.javis_native
    forward, backward = ops.gated_residual_ada_layer_norm, ops.gated_residual_ada_layer_norm_backward
    tests = ("test_schema", "test_faketensor")  # gradients go through the autograd.Function, not through the op
    args = (x, h, gate, shift, scale, gate0, shift0, scale0, mask, 1e-6)
    torch.library.opcheck(forward.default, args, test_utils=tests)
    r, _, mean, rstd = forward(*args)
    if permuted:
        r = r.transpose(1, 2).contiguous().transpose(1, 2)
    grad_args = (dr, dy, r, h if gated else None, mean, rstd, gate, scale, gate0, scale0, mask)
    torch.library.opcheck(backward.default, grad_args, test_utils=tests)


@needs_native
def test_native_op_refuses_what_the_api_never_sends() -> None:
    native_op = torch.ops.javis_native.gated_residual_ada_layer_norm
    x, v = torch.zeros(2, 6, 8), torch.zeros(2, 8)
    none = (None, None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="h has size 5"):
        native_op(x, torch.zeros(2, 5, 8), v, v, v, *none)
    with pytest.raises(RuntimeError, match="h has the wrong dtype"):
        native_op(x, x.bfloat16(), v, v, v, *none)
    with pytest.raises(RuntimeError, match="gate has size 7"):
        native_op(x, x, torch.zeros(2, 7), v, v, *none)
    with pytest.raises(RuntimeError, match="gate and gate0, or none"):
        native_op(x, x, v, v, v, None, v, v, torch.ones(2, 3, dtype=torch.bool), 1e-6)


# 5. torch.compile --------------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("shape", [SMALL[1], SMALL[2]], ids=shape_id)
def test_compiles_to_one_graph(backend: str, shape: dict[str, Any]) -> None:
    torch.compiler.reset()
    args, kwargs = inputs(torch.bfloat16, device_of(backend), **shape)
    run = partial(op, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, args, kwargs)
    for name, value in with_gradients(run, args, kwargs).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_compiles_on_the_reference() -> None:
    torch.compiler.reset()
    args, kwargs = inputs(torch.float64, **SMALL[2])
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for name, value in with_gradients(compiled, args, kwargs).items():
        torch.testing.assert_close(value, with_gradients(reference, args, kwargs)[name])


# 6. and 7. The choice ----------------------------------------------------------------------------------------------


def ops_that_ran(function: Callable[[], object]) -> list[str]:
    """Names of the registered ops of javis that PyTorch's profiler saw."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sorted(event.key for event in profile.key_averages() if event.key.startswith("javis"))


@every_kernel
def test_the_named_backend_is_the_one_that_runs(backend: str) -> None:
    args, kwargs = inputs(torch.float32, device_of(backend), batch=1, frames=2, places=1, width=8, masked=True)
    space = "javis" if backend == "triton" else "javis_native"
    both = [f"{space}::gated_residual_ada_layer_norm", f"{space}::gated_residual_ada_layer_norm_backward"]
    assert ops_that_ran(lambda: with_gradients(partial(op, backend=backend), args, kwargs)) == both
    with use_backend(backend):
        assert ops_that_ran(lambda: with_gradients(op, args, kwargs)) == both
    assert ops_that_ran(lambda: with_gradients(reference, args, kwargs)) == []


@needs_native
def test_auto_runs_the_native_op_on_cpu() -> None:
    args, kwargs = inputs(batch=1, frames=1, places=2, width=8)
    assert ops_that_ran(lambda: op(*args, **kwargs)) == ["javis_native::gated_residual_ada_layer_norm"]
    args, kwargs = inputs(torch.float16, batch=1, frames=1, places=2, width=8)
    assert ops_that_ran(lambda: op(*args, **kwargs)) == []


@pytest.mark.parametrize(
    ("backend", "dtype", "why"),
    [
        ("triton", torch.float64, "float64|not installed|needs a CUDA device"),
        ("cuda", torch.float32, "no CUDA kernel in this version"),
        ("sdpa", torch.float32, "this op has no such implementation"),
        ("cpu", torch.float64, "float64|not built"),
        ("cpu", torch.float16, "float16|not built"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, why: str) -> None:
    args, _ = inputs(dtype, batch=1, frames=1, places=2, width=8)
    with pytest.raises(UsageError, match=why):
        op(*args, backend=backend)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, "x must be"),
        ({"h": torch.zeros(2, 3, 8)}, "h must be"),
        ({"gate": torch.zeros(2, 7)}, "gate must be"),
        ({"scale": torch.zeros(1, 8)}, "scale must be"),
        ({"frame_mask": torch.ones(2, 3, dtype=torch.bool)}, "needs gate0, shift0 and scale0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 6, 8), "h": torch.zeros(2, 6, 8)}
    arguments |= {name: torch.zeros(2, 8) for name in ("gate", "shift", "scale")}
    with pytest.raises(ValueError, match=message):
        op(**(arguments | change))


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
