"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for the two norms with a float8 output. Forward only.

The Triton kernel runs in Triton's interpreter where there is no GPU. What these ops share with those in full precision
(rows, masks, layouts) is tested there as well. Test 9 is in tests/test_imports.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import OPS
from javis.kernels.ops.ada_layer_norm.reference import ada_layer_norm_ref
from javis.kernels.ops.ada_layer_norm_fp8.cases import AdaLayerNormFp8Case
from javis.kernels.ops.gated_residual_ada_layer_norm_fp8.cases import GatedResidualAdaLayerNormFp8Case

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from javis.kernels.ops.ada_layer_norm import triton_impl as norm  # noqa: E402  (needs Triton)

pytestmark = pytest.mark.usefixtures("several_rows_per_program")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "ada_layer_norm_fp8": AdaLayerNormFp8Case,
    "gated_residual_ada_layer_norm_fp8": GatedResidualAdaLayerNormFp8Case,
}
each_op = pytest.mark.parametrize("name", CASES)
SHAPES: list[dict[str, Any]] = [
    {"batch": 2, "frames": 1, "places": 5, "width": 33},
    {"batch": 2, "frames": 3, "places": 3, "width": 24, "masked": True},
    {"batch": 2, "frames": 3, "places": 3, "width": 24, "masked": True, "static": True},
]


def inputs(name: str, dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    return CASES[name](name="test", dtype=dtype, **shape).inputs(seed=1, device=DEVICE)


def exact_y(name: str, args: tuple[Any, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """y in float64, without rounding to float8. (With a gate: of the r that is returned.)"""
    if name.startswith("gated"):
        args = (OPS[name].function(*args, **kwargs, backend="reference")[0], *args[3:])
    kwargs = {key: value for key, value in kwargs.items() if key != "gate0"}
    doubles = [value.double() for value in args[:3]]
    return ada_layer_norm_ref(*doubles, **{k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()})


def ulp(q: Tensor) -> Tensor:
    """Distance of neighbouring e4m3 values at q."""
    return 2.0 ** (q.double().abs().clamp(min=2.0**-6).log2().floor() - 3)


@each_op
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_every_value_is_the_nearest(name: str, shape: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Stronger than the budget: q is within half a step of the float64 result (and what float32 arithmetic adds)."""
    args, kwargs = inputs(name, dtype, **shape)
    *_, q, scale = OPS[name].function(*args, **kwargs, backend=backend)
    y = exact_y(name, args, kwargs)
    assert q.dtype == torch.float8_e4m3fn and q.shape == y.shape and scale.dtype == torch.float32
    if args[-1] is not None:
        assert scale is args[-1]
        scales = scale.double()
    else:
        assert scale.shape == y.shape[:2]
        torch.testing.assert_close(scale.double(), y.abs().amax(-1) / 448, rtol=1e-5, atol=0)
        assert (q.double().abs().amax(-1) == 448).all()  # the largest value of each row takes the whole range
        scales = scale.double()[..., None]
    wanted = (y / scales).clamp(-448, 448)
    error = (q.double() - wanted).abs()
    # r is rounded by other code in the reference; one bfloat16 step of r moves y little, but beyond half a step of q.
    slack = 1e-4 * wanted.abs() + 1e-5
    assert (error <= ulp(wanted) / 2 + slack).all()


@each_op
@pytest.mark.parametrize("static", [False, True])
def test_triton_agrees_with_the_reference(name: str, static: bool) -> None:
    args, kwargs = inputs(name, batch=2, frames=2, places=3, width=72, masked=True, static=static)
    actual = OPS[name].function(*args, **kwargs, backend="triton")
    expected = OPS[name].function(*args, **kwargs, backend="reference")
    for a, b in zip(actual[:-2], expected[:-2], strict=True):
        torch.testing.assert_close(a, b)  # r
    torch.testing.assert_close(actual[-1], expected[-1])
    differing = actual[-2].view(torch.uint8) != expected[-2].view(torch.uint8)
    assert differing.float().mean() < 0.01  # ties that float32 decides one way or the other
    assert (actual[-2].float() - expected[-2].float()).abs().max() <= 32


@triton.jit  # type: ignore[untyped-decorator]
def encode(x_ptr, out_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, norm.e4m3_bits(x, False), mask=at < size)


def test_rounding_to_float8_bit_by_bit() -> None:
    """All e4m3 values, the ties between them, what lies beside those, tiny numbers; against PyTorch's conversion."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()).float() / 2
    x = torch.cat((finite, ties))
    up, down = torch.nextafter(x, torch.full_like(x, 500.0)), torch.nextafter(x, torch.full_like(x, -500.0))
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, 2.0**-10, -(2.0**-10), float("nan")])
    x = torch.cat((x, up, down, tiny, 448 * (2 * torch.rand(1000) - 1))).clamp(-448, 448).to(DEVICE)
    out = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)
    encode[(triton.cdiv(len(x), 1024),)](x, out, len(x), BLOCK=1024)
    expected = x.cpu().to(torch.float8_e4m3fn)
    out = out.cpu()
    nan = x.cpu().isnan()
    assert out.view(torch.float8_e4m3fn).isnan().equal(nan)
    assert torch.equal(out[~nan], expected.view(torch.uint8)[~nan])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_saturation_zero_and_nan(backend: str) -> None:
    run = partial(OPS["ada_layer_norm_fp8"].function, backend=backend)
    x = torch.tensor([[[1.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, float("nan"), 1.0]]], device=DEVICE)
    zero, ones = torch.zeros(1, 4, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    # xhat is (-1, 1, -1, 1): beyond 448 * 0.001 it saturates; infinities do, too.
    q, scale = run(x, zero, zero, torch.tensor(0.001, device=DEVICE), eps=0.0 if backend == "reference" else 1e-12)
    assert q[0, 0].float().tolist() == [-448, 448, -448, 448] and scale.ndim == 0
    assert q[0, 2].float().isnan().all()
    infinite, _ = run(x, float("inf") * ones, zero, torch.tensor([0.5], device=DEVICE))
    assert (infinite[0, 0].float() == 448).all()
    q, scale = run(x, zero, zero)
    assert q[0, 0].float().tolist() == [-448, 448, -448, 448]
    torch.testing.assert_close(scale[0, 0].item(), 1 / 448, rtol=1e-5, atol=0)
    assert (q[0, 1].float() == 0).all() and scale[0, 1] == 1
    assert q[0, 2].float().isnan().all() and scale[0, 2].isnan()
    shift = torch.tensor([[0.0, float("nan"), 0.0, 0.0]], device=DEVICE)  # one NaN spoils its row, and so it shows
    q, scale = run(x, shift, zero)
    assert q[0, 0].float().isnan().all() and scale[0, 0].isnan()


@each_op
@pytest.mark.parametrize("static", [False, True])
def test_any_layout_gives_the_same_and_nothing_is_written_around_it(name: str, static: bool) -> None:
    args, kwargs = inputs(name, torch.bfloat16, batch=2, frames=2, places=2, width=16, masked=True, static=static)
    run = partial(OPS[name].function, backend="triton")
    expected = run(*args, **kwargs)
    around = torch.full((2, 4, 40), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    around[:, :, 8:24] = args[0]
    before = around.clone()
    actual = run(around[:, :, 8:24], *args[1:], **kwargs)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.float(), b.float())
    assert torch.equal(around.nan_to_num(7), before.nan_to_num(7))


@each_op
def test_nothing_to_do(name: str) -> None:
    for batch, places in ((0, 3), (2, 0)):
        args, kwargs = inputs(name, batch=batch, frames=2, places=places, width=8, masked=True)
        *_, q, scale = OPS[name].function(*args, **kwargs, backend="triton")
        assert q.shape == (batch, 2 * places, 8) and scale.shape == (batch, 2 * places)


@each_op
@pytest.mark.parametrize("static", [False, True])
def test_opcheck(name: str, static: bool) -> None:
    args, kwargs = inputs(name, batch=1, frames=2, places=1, width=8, masked=True, static=static)
    args = (args[0].transpose(1, 2).contiguous().transpose(1, 2), *args[1:])
    names = (
        ["gate0", "shift0", "scale0", "frame_mask"] if name.startswith("gated") else ["shift0", "scale0", "frame_mask"]
    )
    op = getattr(torch.ops.javis, name).default
    torch.library.opcheck(op, (*args, *(kwargs[n] for n in names), 1e-6), test_utils=("test_schema", "test_faketensor"))


@each_op
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    torch.compiler.reset()
    args, kwargs = inputs(name, torch.bfloat16, batch=1, frames=2, places=2, width=24, masked=True)
    run = partial(OPS[name].function, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*args, **kwargs), run(*args, **kwargs), strict=True):
        torch.testing.assert_close(a.float(), b.float())


@each_op
def test_the_named_backend_is_the_one_that_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, launch = [], norm.launch_forward
    monkeypatch.setattr(norm, "launch_forward", lambda *a, **k: (launched.append(k["fp8"]), launch(*a, **k))[1])
    args, kwargs = inputs(name, batch=1, frames=1, places=1, width=8)
    OPS[name].function(*args, **kwargs, backend="triton")
    assert launched == ["rows"]
    OPS[name].function(*args, **kwargs, backend="reference")
    if DEVICE == "cpu":  # the interpreter is for proof, not for use
        OPS[name].function(*args, **kwargs)
    assert launched == ["rows"]


@each_op
def test_what_cannot_run_says_why(name: str) -> None:
    args, _ = inputs(name, batch=1, frames=1, places=2, width=8)
    op = OPS[name].function
    with pytest.raises(UsageError, match="no such implementation"):
        op(*args, backend="cpu")
    doubles = [a.double() if isinstance(a, Tensor) else a for a in args]
    with pytest.raises(UsageError, match="float64|needs a CUDA device"):
        op(*doubles, backend="triton")
    assert op(*doubles)[-2].dtype == torch.float8_e4m3fn
    args[0].requires_grad_()
    for backend in ("auto", "triton"):
        with pytest.raises(UsageError, match="no backward pass"):
            op(*args, backend=backend)
    with torch.no_grad():
        op(*args)
    with pytest.raises(ValueError, match="y_scale must be a float32"):
        op(*args[:-1], torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match="y_scale must be a float32"):
        op(*args[:-1], torch.ones((), dtype=torch.bfloat16, device=DEVICE))


@each_op
def test_case_by_hand(name: str) -> None:
    """Row (1, 3): xhat is (-1, 1); y = (-2, 3) is the largest 3, so q is (-2 * 448 / 3, 448), to nearest -288."""
    x = torch.tensor([[[1.0, 3.0]]], device=DEVICE)
    shift, scale = torch.zeros(1, 2, device=DEVICE), torch.tensor([[1.0, 2.0]], device=DEVICE)
    for backend in ("reference", "triton"):
        args = (x, shift, scale) if name.startswith("ada") else (x / 2, x / 2, None, shift, scale)
        *_, q, y_scale = OPS[name].function(*args, eps=0.0 if backend == "reference" else 1e-12, backend=backend)
        assert q.float().tolist() == [[[-288.0, 448.0]]]
        torch.testing.assert_close(y_scale.item(), 3 / 448, rtol=1e-5, atol=0)
