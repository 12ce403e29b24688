"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for group_norm_silu.

The Triton kernels run in Triton's interpreter where there is no GPU. Test 9 is in tests/test_imports.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import group_norm_silu, triton_support
from javis.kernels.ops.group_norm_silu.cases import GroupNormSiluCase
from javis.kernels.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not triton_support.HAS_TRITON, reason="triton is not installed")
triton_op = partial(group_norm_silu, backend="triton")
reference = partial(group_norm_silu, backend="reference")
# One tile and its rest; several tiles of places and of channels, groups across them; one place; 3D.
SHAPES: list[dict[str, Any]] = [
    {"batch": 2, "channels": 12, "places": (3, 5), "groups": 3},
    {"batch": 1, "channels": 72, "places": (7, 6), "groups": 2},
    {"batch": 2, "channels": 6, "places": (1, 1), "groups": 2},
    {"batch": 1, "channels": 8, "places": (2, 2, 3), "groups": 8},
]


def inputs(dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[Any, ...]:
    return GroupNormSiluCase(name="test", dtype=dtype, **shape).inputs(seed=1, device=DEVICE)[0]


def with_gradients(
    function: Callable[..., Tensor], args: tuple[Any, ...], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    x, groups, weight, bias = args
    leaves = [value.detach().to(dtype or value.dtype).requires_grad_() for value in (x, weight, bias)]
    y = function(leaves[0], groups, leaves[1], leaves[2])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE, x.dtype).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach()} | dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_forward_and_gradients_are_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    args = inputs(dtype, **shape)
    actual = with_gradients(triton_op, args)
    exact, same = with_gradients(reference, args, torch.float64), with_gradients(reference, args)
    assert actual["y"].stride() == args[0].stride()
    for name, value in actual.items():
        assert_within_budget(name, value, exact[name], same[name])


@needs_triton
def test_programs_with_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What large inputs do, on a small one: three tiles of places in a program, two chunks, the last one ragged."""
    from javis.kernels.ops.group_norm_silu import triton_impl

    monkeypatch.setattr(triton_impl, "PLACES", 4)
    monkeypatch.setattr(triton_impl, "_grid", lambda x: ((x.shape[0] * 2, 1), 2, 3))
    args = inputs(batch=2, channels=10, places=(17,), groups=5)
    exact, same = with_gradients(reference, args, torch.float64), with_gradients(reference, args)
    for name, value in with_gradients(triton_op, args).items():
        assert_within_budget(name, value, exact[name], same[name])


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_agrees_with_pytorch(backend: str) -> None:
    x, groups, weight, bias = inputs(**SHAPES[0])
    expected = F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6))
    y = group_norm_silu(x, groups, weight, bias, backend=backend)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@needs_triton
def test_large_mean_does_not_cancel() -> None:
    x, groups, weight, bias = inputs(batch=1, channels=8, places=(40,), groups=2)
    x = (x.movedim(1, -1) + 3000).movedim(-1, 1)
    exact = reference(x.double(), groups, weight.double(), bias.double())
    assert_within_budget("y", triton_op(x, groups, weight, bias), exact, reference(x, groups, weight, bias))


@needs_triton
def test_bfloat16_rounds_to_nearest() -> None:
    args = inputs(torch.bfloat16, **SHAPES[0])
    wide = triton_op(args[0].float(), args[1], args[2].float(), args[3].float())
    assert torch.equal(triton_op(*args), wide.bfloat16())


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_nan_spoils_its_group_and_nothing_else(backend: str) -> None:
    args = inputs(**SHAPES[0])
    args[0][1, 5, 1, 1] = float("nan")  # group 1 of 3, channels 4..7
    y = group_norm_silu(*args, backend=backend)
    assert y[1, 4:8].isnan().all()
    assert y[0].isfinite().all() and y[1, :4].isfinite().all() and y[1, 8:].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_case_by_hand(backend: str) -> None:
    """One group of the values 1, 3, 1, 3: xhat is -1, 1, -1, 1, and silu(1) = 1 / (1 + 1/e)."""
    x = torch.tensor([1.0, 3.0, 1.0, 3.0], device=DEVICE).view(1, 2, 2).movedim(-1, 1)
    one, zero = torch.ones(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    y = group_norm_silu(x, 1, one, zero, eps=1e-12, backend=backend)
    low, high = -1 / (1 + torch.e), 1 / (1 + 1 / torch.e)
    expected = torch.tensor([[[low, low], [high, high]]], device=DEVICE)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@needs_triton
def test_layouts() -> None:
    args = inputs(**SHAPES[0])
    contiguous = args[0].contiguous()
    with pytest.raises(UsageError, match="not channels-last"):
        triton_op(contiguous, *args[1:])
    y = group_norm_silu(contiguous, *args[1:])  # auto takes the reference
    assert y.is_contiguous()
    torch.testing.assert_close(y, triton_op(*args), rtol=1e-5, atol=1e-5)
    # A dy of another layout, and modulation with strides.
    strided = torch.stack((args[2], args[3]), dim=-1).unbind(-1)
    assert torch.equal(triton_op(args[0], args[1], *strided), triton_op(*args))
    leaf = args[0].detach().requires_grad_()
    gradients = [
        torch.autograd.grad(triton_op(leaf, *args[1:]), leaf, dy)[0]
        for dy in (torch.ones_like(contiguous), torch.ones(1, 1, 1, 1, device=DEVICE).expand(contiguous.shape))
    ]
    assert torch.equal(*gradients)


@needs_triton
@pytest.mark.parametrize(("batch", "places"), [(0, (2, 2)), (2, (0, 2))])
def test_nothing_to_do(batch: int, places: tuple[int, ...]) -> None:
    results = with_gradients(triton_op, inputs(batch=batch, channels=4, places=places, groups=2))
    assert results["y"].shape == results["dx"].shape == (batch, 4, *places)
    assert torch.equal(results["dweight"], torch.zeros(4, device=DEVICE))


@needs_triton
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted: bool) -> None:
    x, groups, weight, bias = inputs(batch=1, channels=4, places=(3,), groups=2)
    x = x.movedim(1, -1)
    dy = torch.randn_like(x)
    if permuted:
        x, dy = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, dy))
    ops, tests = torch.ops.javis, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.group_norm_silu.default, (x, groups, weight, bias, 1e-6), test_utils=tests)
    _, mean, rstd = ops.group_norm_silu(x, groups, weight, bias, 1e-6)
    args = (dy, x, mean, rstd, weight, bias, groups)
    torch.library.opcheck(ops.group_norm_silu_backward.default, args, test_utils=tests)


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_triton)])
def test_compiles_to_one_graph(backend: str) -> None:
    torch.compiler.reset()
    args = inputs(torch.bfloat16, **SHAPES[0])
    run = partial(group_norm_silu, backend=backend)
    actual = with_gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), args)
    for name, value in with_gradients(run, args).items():
        torch.testing.assert_close(actual[name], value)


@needs_triton
def test_the_named_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from javis.kernels.ops.group_norm_silu import triton_impl

    launched: list[str] = []
    for name in ("forward", "backward"):
        launch = getattr(triton_impl, name)
        monkeypatch.setattr(
            triton_impl, name, lambda *args, n=name, launch=launch: (launched.append(n), launch(*args))[1]
        )
    args = inputs(batch=1, channels=4, places=(2,), groups=2)
    with_gradients(triton_op, args)
    assert launched == ["forward", "backward"]
    with_gradients(reference, args)
    if DEVICE == "cpu":  # the interpreter is for proof, not for use
        with_gradients(group_norm_silu, args)
    assert len(launched) == 2


def test_what_cannot_run_says_why() -> None:
    args = inputs(torch.float64, **SHAPES[0])
    with pytest.raises(UsageError, match="float64|not installed|needs a CUDA device"):
        triton_op(*args)
    with pytest.raises(UsageError, match="no such implementation"):
        group_norm_silu(*args, backend="cpu")
    x, _, weight, bias = args
    with pytest.raises(ValueError, match="num_groups must be a divisor of the 12 channels, got 5"):
        group_norm_silu(x, 5, weight, bias)
    with pytest.raises(ValueError, match="weight must be"):
        group_norm_silu(x, 3, weight[:-1], bias)
    with pytest.raises(ValueError, match="x must be"):
        group_norm_silu(x[0, :, 0], 3, weight, bias)


def test_reference_gradients() -> None:
    x, groups, weight, bias = inputs(torch.float64, batch=2, channels=4, places=(3,), groups=2)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, w, b: reference(x, groups, w, b), leaves)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offsets_beyond_31_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free GPU memory")
    x = torch.zeros(2, 64, 2**24 + 8, dtype=torch.bfloat16, device="cuda").movedim(1, -1).contiguous().movedim(-1, 1)
    x[1].copy_(torch.randn(64, 1, device="cuda").expand(64, 2**24 + 8))
    one, zero = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    assert torch.equal(triton_op(x, 4, one, zero)[1:, :, -8:], triton_op(x[1:, :, -8:].clone(), 4, one, zero))
