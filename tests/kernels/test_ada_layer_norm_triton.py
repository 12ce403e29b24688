"""The Triton kernel of ada_layer_norm: in Triton's interpreter on CPU, on the GPU where there is one.

What does not depend on the backend (validation, the reference, the choice) is in test_ada_layer_norm.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.kernels import ada_layer_norm, triton_support
from javis.kernels.testing import assert_within_budget
from tests.kernels.test_ada_layer_norm import case, reference, with_gradients

pytestmark = [
    pytest.mark.skipif(not triton_support.HAS_TRITON, reason="triton is not installed"),
    pytest.mark.usefixtures("several_rows_per_program"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_op = partial(ada_layer_norm, backend="triton")

# T = 1; an odd T; rows that end inside a program's share; widths that are no power of two.
SHAPES = [
    {"batch": 2, "frames": 1, "places": 6, "width": 33},
    {"batch": 2, "frames": 3, "places": 5, "width": 24, "masked": True},
]


def inputs(dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return case(dtype, **shape).inputs(seed=1, device=DEVICE)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_forward_and_gradients_are_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    args, kwargs = inputs(dtype, **shape)
    actual = with_gradients(triton_op, args, kwargs)
    exact = with_gradients(reference, args, kwargs, torch.float64)
    same_dtype = with_gradients(reference, args, kwargs)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@pytest.mark.parametrize("tokens", [1, 300, 30720, 108000])
def test_rows_per_program(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row has one program, and the partial sums stay few; on the real rules, not those of this file."""
    monkeypatch.undo()
    from javis.kernels.ops.ada_layer_norm import triton_impl

    assert triton_impl.forward_rows_per_program(tokens) in (1, 4, 8)
    rows = triton_impl.backward_rows_per_program(tokens, tokens)
    assert rows & (rows - 1) == 0
    assert rows <= 64
    assert -(-tokens // rows) <= 2048


@pytest.mark.usefixtures("poison")
def test_one_token_under_the_rules_of_small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    args, kwargs = inputs(batch=1, frames=1, places=1, width=3)
    exact = with_gradients(reference, args, kwargs, torch.float64)
    same_dtype = with_gradients(reference, args, kwargs)
    for name, value in with_gradients(triton_op, args, kwargs).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


def test_gradients_go_to_the_modulation_of_their_frame() -> None:
    """d(sum y)/dshift counts the tokens of the frames that use it; 3 places a frame, so 2 partial sums a frame."""
    (x, shift, scale), kwargs = inputs(batch=2, frames=4, places=3, width=8, masked=True)
    kwargs["frame_mask"] = torch.tensor([[True, False, False, True], [False, True, False, False]], device=DEVICE)
    for leaf in (shift, kwargs["shift0"]):
        leaf.requires_grad_()
    triton_op(x, shift, scale, **kwargs).sum().backward()
    for leaf, counts in ((shift, [6.0, 3.0]), (kwargs["shift0"], [6.0, 9.0])):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad.cpu(), torch.tensor(counts)[:, None].expand(2, 8))


def test_large_mean_does_not_cancel() -> None:
    x = torch.randn(1, 2, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 3000
    zero = torch.zeros(1, 256, device=DEVICE)
    exact = reference(x.double(), zero.double(), zero.double())
    assert_within_budget("y", triton_op(x, zero, zero), exact, reference(x, zero, zero))


def test_bfloat16_rounds_to_nearest() -> None:
    args, kwargs = inputs(torch.bfloat16, batch=1, frames=2, places=2, width=72, masked=True)
    wide = {name: value.float() if value.is_floating_point() else value for name, value in kwargs.items()}
    expected = triton_op(*(value.float() for value in args), **wide).bfloat16()
    assert torch.equal(triton_op(*args, **kwargs), expected)


def test_infinity_and_nan_come_through() -> None:
    args, _ = inputs(torch.bfloat16, batch=1, frames=1, places=3, width=40)
    args[0][0, 1, 5] = float("nan")
    args[0][0, 2, 5] = float("inf")
    y = triton_op(*args)
    assert y[0, 0].isfinite().all()
    assert y[0, 1].isnan().all()
    assert not y[0, 2].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_gives_the_same_and_nothing_is_written_around_it(dtype: torch.dtype) -> None:
    (x, shift, scale), kwargs = inputs(dtype, batch=2, frames=3, places=2, width=24, masked=True)
    expected = with_gradients(triton_op, (x, shift, scale), kwargs)
    around = torch.full((2, 6, 60), float("nan"), dtype=dtype, device=DEVICE)
    around[:, :, 12:36] = x
    before = around.clone()
    layouts = {
        "columns of a wider tensor": around[:, :, 12:36],
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),
    }
    modulation = torch.stack((scale, shift), dim=-1).unbind(-1)
    mask = {"frame_mask": kwargs["frame_mask"].t().contiguous().t()}
    for name, layout in layouts.items():
        assert not layout.is_contiguous(), name
        actual = with_gradients(triton_op, (layout, modulation[1], modulation[0]), kwargs | mask)
        for key, value in actual.items():
            assert torch.equal(value, expected[key]), (name, key)
    assert torch.equal(around.nan_to_num(7), before.nan_to_num(7))


def test_a_dy_without_strides_is_read_as_it_is() -> None:
    args, _ = inputs(batch=2, frames=1, places=3, width=20)
    leaves = [a.clone().requires_grad_() for a in args]
    got = torch.autograd.grad(triton_op(*leaves).sum(), leaves)  # sum() hands back a dy of stride 0
    dense = torch.autograd.grad(triton_op(*leaves), leaves, torch.ones(2, 3, 20, device=DEVICE))
    for a, b in zip(got, dense, strict=True):
        assert torch.equal(a, b)


def test_modulation_of_its_own_dtype_and_of_mixed_ones() -> None:
    (x, shift, scale), _ = inputs(torch.bfloat16, batch=2, frames=2, places=2, width=40)
    shift, scale = shift.float().requires_grad_(), scale.requires_grad_()
    y = triton_op(x, shift, scale)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert shift.grad is not None and scale.grad is not None
    assert (shift.grad.dtype, scale.grad.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(shift.grad, torch.full((2, 40), 4.0, device=DEVICE))  # d(sum y)/dshift counts the tokens


@pytest.mark.parametrize(("batch", "frames", "places"), [(0, 3, 4), (2, 3, 0)])
def test_nothing_to_do(batch: int, frames: int, places: int) -> None:
    args, kwargs = inputs(batch=batch, frames=frames, places=places, width=16, masked=True)
    results = with_gradients(triton_op, args, kwargs)
    assert results["y"].shape == results["dx"].shape == (batch, frames * places, 16)
    assert torch.equal(results["dshift"], torch.zeros(batch, 16, device=DEVICE))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(masked: bool, permuted: bool) -> None:
    (x, shift, scale), kwargs = inputs(batch=1, frames=2, places=2, width=8, masked=masked)
    dy = torch.randn_like(x)
    if permuted:
        x, dy = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, dy))
    shift0, scale0, mask = (kwargs.get(name) for name in ("shift0", "scale0", "frame_mask"))
    ops = torch.ops.javis
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.ada_layer_norm.default, (x, shift, scale, shift0, scale0, mask, 1e-6), test_utils=tests)
    _, mean, rstd = ops.ada_layer_norm(x, shift, scale, shift0, scale0, mask, 1e-6)
    args = (dy, x, mean, rstd, scale, scale0, mask)
    torch.library.opcheck(ops.ada_layer_norm_backward.default, args, test_utils=tests)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(masked: bool) -> None:
    torch.compiler.reset()
    args, kwargs = inputs(torch.bfloat16, batch=2, frames=2, places=2, width=24, masked=masked)
    compiled = torch.compile(triton_op, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, args, kwargs)
    for name, value in with_gradients(triton_op, args, kwargs).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from javis.kernels.ops.ada_layer_norm import triton_impl

    launched = []
    for name in ("launch_forward", "launch_backward"):
        launch = getattr(triton_impl, name)

        def counted(*args: Any, name: str = name, launch: Any = launch, **kwargs: Any) -> None:
            launched.append(name)
            launch(*args, **kwargs)

        monkeypatch.setattr(triton_impl, name, counted)
    args, kwargs = inputs(batch=1, frames=1, places=2, width=8)
    with_gradients(triton_op, args, kwargs)
    assert launched == ["launch_forward", "launch_backward"]
    if DEVICE == "cpu":  # the interpreter is for proof, not for use
        with_gradients(ada_layer_norm, args, kwargs)
        assert len(launched) == 2


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
    assert torch.equal(triton_op(ends, zero, zero), triton_op(ends.contiguous(), zero, zero))
