"""Calls of gated_residual_ada_layer_norm: layouts, registration, torch.compile, the choice of the backend, bad input.

Tests 2 to 7 of an op (CONTRIBUTING.md, "Adding an op"); the numbers are in test_gated_residual_ada_layer_norm.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from javis.errors import UsageError
from javis.kernels import gated_residual_ada_layer_norm as op
from javis.kernels import use_backend
from tests.kernels.calls import ops_that_ran
from tests.kernels.test_gated_residual_ada_layer_norm import (
    DTYPES,
    SMALL,
    device_of,
    every_kernel,
    inputs,
    needs_native,
    reference,
    shape_id,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("several_rows_per_program")

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
        ("cuda", torch.float32, "needs CUDA tensors, got one on cpu"),
        ("sdpa", torch.float32, "this op has no such implementation"),
        ("cpu", torch.float64, "float64|not built"),
        ("cpu", torch.float16, "float16|not built"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, why: str) -> None:
    args, _ = inputs(dtype, batch=1, frames=1, places=2, width=8)
    with pytest.raises(UsageError, match=why):
        op(*args, backend=backend)


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
