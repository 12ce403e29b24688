"""No kernel writes outside its results: outputs, partial sums and buffers of every op, forward and backward.

The shapes are odd, so that the last tile of every axis is not full. What surrounds the *inputs* is watched by the tests
of each op.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.kernels import OPS, Backend, native
from javis.kernels.backend import why_not
from javis.kernels.cases import OpCase
from javis.kernels.registry import NAMES
from tests.kernels.borders import BORDER, Borders, guarded

needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
OWN = (Backend.CPU, Backend.TRITON)  # kernels of this project that run here
norm: list[dict[str, Any]] = [
    {"batch": 2, "frames": 3, "places": 3, "width": 35, "masked": True},
    {"batch": 1, "frames": 1, "places": 5, "width": 7},
]
attention: list[dict[str, Any]] = [
    {"axis": "temporal", "batch": 2, "frames": 5, "places": 3, "heads": 2, "size": 24, "rope": True},
    {"axis": "temporal", "batch": 1, "frames": 17, "places": 1, "heads": 1, "size": 6, "norm": False},
    {"axis": "spatial", "batch": 1, "frames": 2, "places": 3, "heads": 1, "size": 72},
]
keys: list[dict[str, Any]] = [
    {"batch": 2, "tokens": 5, "keys": 3, "heads": 3, "size": 24, "masked": True},
    {"batch": 1, "tokens": 67, "keys": 7, "heads": 1, "size": 6},
]
SHAPES: dict[str, list[dict[str, Any]]] = {
    "ada_layer_norm": norm,
    "gated_residual_ada_layer_norm": [*norm, {"batch": 2, "frames": 1, "places": 3, "width": 33, "gated": False}],
    "ada_layer_norm_fp8": norm,
    "gated_residual_ada_layer_norm_fp8": norm,
    "prior_injection": keys,
    "text_cross_attention": [*keys, {"batch": 1, "tokens": 65, "keys": 127, "heads": 2, "size": 9}],
    "folded_prior_injection": keys,
    "flow_update": [{"batch": 2, "video": (3, 2, 3, 5), "audio": (3, 3, 5), "masked": True}],
    "bidirectional_attention": [
        {"batch": 2, "video": 19, "audio": 7, "heads": 2, "size": 24},
        {"batch": 1, "video": 5, "audio": 70, "heads": 1, "size": 6},
    ],
    "group_norm_silu": [{"batch": 2, "channels": 70, "places": (5, 7), "groups": 10}],
    "factorized_attention": [*attention, {"axis": "spatial", "places": 131, "heads": 1, "size": 6}],
    "qk_norm_rope": attention,
    "gelu_linear": [{"batch": 2, "tokens": 3, "width": 5, "out": 37}],
}


def call(case: OpCase, backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Outputs of the op, then the gradients of its floating-point arguments."""
    leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
    if case.differentiable:
        for leaf in leaves:
            leaf.requires_grad_()
    out = OPS[case.op].function(*args, **kwargs, backend=backend)  # type: ignore[attr-defined]
    out = [y for y in (out if isinstance(out, tuple) else (out,)) if isinstance(y, Tensor)]
    yield from out
    differentiable = [y for y in out if y.requires_grad]
    if differentiable:
        dy = [torch.randn_like(y) for y in differentiable]
        yield from (g for g in torch.autograd.grad(differentiable, leaves, dy, allow_unused=True) if g is not None)


@pytest.mark.usefixtures("several_rows_per_program")
@pytest.mark.parametrize(("name", "backend"), [(n, b) for n in NAMES for b in OPS[n].checks if b in OWN], ids=str)
def test_nothing_is_written_outside_the_results(name: str, backend: Backend) -> None:
    kind = type(OPS[name].cases()[0])
    ran, reason = 0, None
    for shape in SHAPES[name]:
        for dtype in (torch.float32, torch.bfloat16):
            case = kind(name="test", dtype=dtype, **shape)
            args, kwargs = case.inputs()
            reason = why_not(OPS[name].checks, backend, *args, *kwargs.values())
            if reason is not None:
                continue
            ran += 1
            with guarded() as borders:
                results = [x.detach() for x in call(case, backend, args, kwargs)]
            assert not borders.touched(), f"{shape}, {dtype}"
            assert all(x.float().isfinite().all() for x in results), f"{shape}, {dtype}: not everything was written"
            # The last step of folded_prior_injection is a product of PyTorch's.
            assert name == "folded_prior_injection" or any(borders.holds(x) for x in results), f"{shape}: none watched"
    if ran == 0:
        pytest.skip(f"{backend.value} cannot run here: {reason}")


def test_every_op_with_kernels_of_its_own_has_shapes() -> None:
    assert set(SHAPES) == {name for name in NAMES if any(backend in OPS[name].checks for backend in OWN)}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_ops_that_overwrite_stay_inside(dtype: torch.dtype) -> None:
    """What they overwrite is a product of PyTorch's, whose memory is not between borders."""
    ops, borders = torch.ops.javis_native, Borders()
    for rows, width in ((1, 1), (3, 7), (5, 37), (2, 130)):
        ops.bias_gelu_(borders.place(torch.randn(rows, width).to(dtype)), torch.randn(width))
    for tokens, groups, size in ((1, 1, 1), (3, 5, 7), (5, 3, 32), (2, 16, 33)):
        scores = borders.place(torch.randn(2, tokens, groups * size).to(dtype))
        ops.group_softmax_(scores, torch.zeros(2, groups * size), groups)
    assert not borders.touched()


# -- the borders themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [-1, 12, 12 + BORDER // 2])
def test_a_byte_outside_is_found(at: int) -> None:
    with guarded() as borders:
        inside, other = torch.empty(3), torch.empty_strided((2, 3), (1, 2))
        assert inside.isnan().all()
        inside.fill_(1.0)
        other.fill_(2.0)
        assert not borders.touched()
        ctypes.memset(inside.data_ptr() + at, 7, 1)
    assert borders.touched() == [f"torch.float32 [3] of 12 bytes: 1 written at {at} to {at}"]


def test_allocations_of_every_kind_are_guarded() -> None:
    x = torch.ones(2, 3)
    with guarded() as borders:
        made = [torch.empty(2), x.new_empty(4), torch.empty_like(x), torch.empty_like(x.t())]
        made += [torch.empty(3, dtype=torch.bfloat16), torch.empty_strided((2, 2), (1, 5))]
        assert all(borders.holds(y) for y in made)
        assert all(math.isnan(v) for y in made for v in y.flatten().tolist())
        assert torch.equal(torch.arange(4), torch.tensor([0, 1, 2, 3]))  # resizes what it allocates
        assert not borders.touched()
        assert not borders.holds(x)
    assert not borders.holds(torch.empty(2))


@needs_native
def test_allocations_in_native_ops_are_guarded() -> None:
    with guarded() as borders:
        assert borders.holds(torch.ops.javis_native.bias_gelu(torch.randn(3, 5), None))
