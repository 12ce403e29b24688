"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for linear. Test 9 is in tests/test_imports.py.

It registers nothing, so that there is no opcheck: what runs is an op of PyTorch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import onednn, use_backend
from javis.kernels.backend import Backend, why_not_auto
from javis.kernels.ops.linear.api import CHECKS, linear
from javis.kernels.ops.linear.cases import LinearCase
from javis.kernels.testing import assert_within_budget
from javis.model.embed import Linear
from javis.model.ops import ModelOps
from tests.kernels.calls import layouts, ops_that_ran, with_gradients

from .calls import BAD_PRODUCTS

OP = "mkldnn::_linear_pointwise"
NAMES = ("x", "weight", "bias")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    {"batch": 1, "tokens": 1, "width": 1, "out": 1},
    {"batch": 2, "tokens": 7, "width": 5, "out": 33},
    {"batch": 1, "tokens": 40, "width": 96, "out": 24},
    {"batch": 2, "tokens": 260, "width": 1152, "out": 300},  # sums of full size; more rows than are held
]
direct = partial(linear, backend="onednn")
reference = partial(linear, backend="reference")
needs_onednn = pytest.mark.skipif(onednn.WHY_NOT is not None, reason=str(onednn.WHY_NOT))


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> LinearCase:
    return LinearCase(name="test", dtype=dtype, **shape)


def can(dtype: torch.dtype) -> None:
    reason = onednn.why_not(torch.zeros(1, dtype=dtype))
    if reason is not None:
        pytest.skip(reason)


def both(function: Any, args: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The result without gradients, and the one with them."""
    with torch.no_grad():
        alone = function(*(x.to(dtype or x.dtype) for x in args))
    return with_gradients(function, NAMES, args, dtype=dtype) | {"y without gradients": alone}


def products(function: Any) -> int:
    return ops_that_ran(function, "mkldnn::_linear").count(OP)


# 1. Budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_forward_and_gradients_are_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    can(dtype)
    args, _ = case(dtype, **shape).inputs(seed=1)
    exact, same_dtype = both(reference, args, torch.float64), both(reference, args)
    for name, value in both(direct, args).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@pytest.mark.parametrize("faster", [False, True])
def test_products_inside_the_ops(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mm`` and its kin, on either library, against float64."""
    if faster:
        can(torch.float32)
    monkeypatch.setattr(onednn, "WHY_NOT_AUTO", None if faster else "a test")
    generator = torch.Generator().manual_seed(0)
    for rows, wide, narrow in ((50, 9, 3), (1, 1, 1), (33, 64, 40), (1500, 600, 300)):
        a, b = torch.randn(rows, wide, generator=generator), torch.randn(rows, narrow, generator=generator)
        pairs: dict[str, tuple[Any, Tensor, Tensor]] = {
            "mm": (onednn.mm, a.t().contiguous(), b),
            "mm of views": (onednn.mm, a.t(), torch.stack((b, b), 2)[:, :, 0]),
        }
        for name, (function, left, right) in pairs.items():
            expected = left.double() @ right.double()
            assert_within_budget(name, function(left, right), expected, torch.mm(left, right))
        for left, right in ((a, b), (b, a)):
            expected = left.double().t() @ right.double()
            assert_within_budget(
                "transposed", onednn.mm_of_transposed(left, right), expected, torch.mm(left.t(), right)
            )
        for batch in (0, 1, 3):
            left, right = a[None].expand(batch, -1, -1), torch.randn(batch, wide, narrow, generator=generator)
            expected = left.double() @ right.double()
            assert_within_budget("bmm", onednn.bmm(left, right), expected, torch.bmm(left, right))
        assert (products(lambda a=a, b=b: onednn.mm(a.t(), b)) > 0) is faster


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    can(dtype)
    args, _ = case(dtype, tokens=3, width=4, out=5).inputs()
    args[0][0, 1, 2] = float("nan")
    y = direct(*args)[0]
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


# 2. to 4. Layouts, empty batches --------------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.usefixtures("poison")
def test_non_contiguous_inputs_give_the_same() -> None:
    (x, weight, bias), _ = case(batch=2, tokens=5, width=6, out=9).inputs()
    expected = both(direct, (x, weight, bias))
    weights = {"transposed": weight.t().contiguous().t(), "columns": torch.cat((weight, weight), 1)[:, :6]}
    strided = torch.stack((bias, bias), dim=1)[:, 0]
    for name, layout in layouts(x).items():
        for how, other in weights.items():
            for key, value in both(direct, (layout, other, strided)).items():
                message = f"{name}, {how}, {key}"
                torch.testing.assert_close(value, expected[key], msg=lambda m, message=message: f"{message}: {m}")


@needs_onednn
def test_inputs_are_not_written() -> None:
    args, _ = case(batch=2, tokens=5, width=6, out=9).inputs()
    before = [x.clone() for x in args]
    both(direct, args)
    for now, then in zip(args, before, strict=True):
        assert torch.equal(now, then)


@needs_onednn
def test_no_bias_and_frozen_parts() -> None:
    (x, weight, bias), _ = case(tokens=5, width=6, out=9).inputs()
    torch.testing.assert_close(direct(x, weight, None), reference(x, weight, None))
    for chosen in ((True, False, False), (False, True, False), (False, False, True)):
        inputs = [t.clone().requires_grad_(wanted) for t, wanted in zip((x, weight, bias), chosen, strict=True)]
        one = inputs[chosen.index(True)]
        (got,) = torch.autograd.grad(direct(*inputs).sum(), one)  # sum() hands back a dy of stride 0
        torch.testing.assert_close(got, torch.autograd.grad(reference(*inputs).sum(), one)[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("batch", "tokens", "out"), [(0, 3, 6), (2, 0, 6), (2, 3, 0)])
def test_nothing_to_do(batch: int, tokens: int, out: int, backend: str) -> None:
    args, _ = case(batch=batch, tokens=tokens, width=4, out=out).inputs()
    results = both(partial(linear, backend=backend), args)
    assert results["y"].shape == results["y without gradients"].shape == (batch, tokens, out)
    assert torch.equal(results["dweight"], torch.zeros(out, 4))


# 5. torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("auto", torch.float32), ("auto", torch.float64), pytest.param("onednn", torch.float32, marks=needs_onednn)],
    ids=str,
)
def test_compiles_to_one_graph(backend: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    args, _ = case(dtype, batch=2, tokens=5, width=6, out=9).inputs()
    function = partial(linear, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = both(compiled, args)
    for name, value in both(function, args).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")
    if backend == "onednn":
        assert products(lambda: with_gradients(compiled, NAMES, args)) > 0


# 6. and 7. The choice -------------------------------------------------------------------------------------------------


@needs_onednn
def test_the_named_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    args, _ = case(tokens=3, width=4, out=5).inputs()
    assert products(lambda: direct(*args)) == products(lambda: with_gradients(direct, NAMES, args)) == 1
    assert products(lambda: reference(*args)) == 0
    with use_backend("onednn"):
        assert products(lambda: linear(*args)) == 1
    for reason in (None, "MKL is at home here"):
        monkeypatch.setattr(onednn, "WHY_NOT_AUTO", reason)
        assert products(lambda: linear(*args)) == (reason is None)
        assert products(lambda: direct(*args)) == 1
        assert why_not_auto(CHECKS, Backend.ONEDNN, *args) == reason
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*args).dtype == torch.bfloat16


def test_the_layer_of_the_model_calls_the_op() -> None:
    seen = []

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.shape)
        return F.linear(x, weight, bias)

    layer = Linear(4, 5, ModelOps(linear=spy))
    assert isinstance(layer, torch.nn.Linear)
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = torch.randn(2, 3, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert seen == [(2, 3, 4)]


@pytest.mark.parametrize(
    ("vendor", "has_mkl", "capability", "stays"),
    [
        ("AuthenticAMD", True, "AVX512", None),
        ("AuthenticAMD", True, "AVX2", "no gain"),
        ("AuthenticAMD", False, "AVX512", "no gain"),
        ("GenuineIntel", True, "AVX512", "at home"),
        ("", True, "AVX512", "at home"),
    ],
)
def test_where_float32_products_move(vendor: str, has_mkl: bool, capability: str, stays: str | None) -> None:
    reason = onednn._slower_in_float32(vendor, has_mkl, capability)
    assert reason is None if stays is None else stays in str(reason)


def test_who_made_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: x\n")
    assert onednn._vendor(cpuinfo) == "AuthenticAMD"
    cpuinfo.unlink()
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel")
    assert onednn._vendor(cpuinfo) == "GenuineIntel"
    monkeypatch.setattr("platform.processor", str)
    assert onednn._vendor(cpuinfo) == ""


@pytest.mark.parametrize(
    ("backend", "dtype", "why"),
    [
        ("onednn", torch.float64, "no float64 products|oneDNN"),
        ("onednn", torch.float16, "no float16 products|oneDNN"),
        ("triton", torch.float32, "no such implementation"),
        ("sdpa", torch.float32, "no such implementation"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, why: str) -> None:
    args, _ = case(dtype, tokens=2, width=4, out=3).inputs()
    with pytest.raises(UsageError, match=why):
        linear(*args, backend=backend)
    assert linear(*args).dtype == dtype


@needs_onednn
def test_other_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    args, _ = case(tokens=2, width=4, out=3).inputs()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of GPUs that are not there
    try:
        with pytest.raises(UsageError, match="switched off"):
            direct(*args)
    finally:
        torch._C._set_mkldnn_enabled(True)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="autocast"):
        direct(*args)
    with pytest.raises(UsageError, match="nothing to multiply"):
        direct(args[0][:, :0], *args[1:])
    assert "needs CPU tensors, got one on meta" in str(CHECKS[Backend.ONEDNN](*(x.to("meta") for x in args)))
    monkeypatch.setattr(onednn, "_BFLOAT16", False)
    with pytest.raises(UsageError, match="no bfloat16 products for this processor"):
        direct(*(x.bfloat16() for x in args))
    monkeypatch.setattr(onednn, "WHY_NOT", "this PyTorch was built without oneDNN")
    with pytest.raises(UsageError, match="built without oneDNN"):
        direct(*args)
    assert torch.equal(linear(*args), reference(*args))


# 8. The reference -----------------------------------------------------------------------------------------------------


def test_reference_gradients() -> None:
    args, _ = case(torch.float64, batch=2, tokens=3, width=4, out=5).inputs()
    assert torch.autograd.gradcheck(reference, [x.requires_grad_() for x in args])


@pytest.mark.parametrize("backend", ["auto", pytest.param("onednn", marks=needs_onednn), "reference"])
def test_case_by_hand(backend: str) -> None:
    x, weight, bias = torch.tensor([[[2.0, 1.0]]]), torch.tensor([[3.0, -5.0], [1.0, 4.0]]), torch.tensor([0.5, -1.0])
    assert torch.equal(linear(x, weight, bias, backend=backend), torch.tensor([[[1.5, 5.0]]]))


@BAD_PRODUCTS
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 2, 4),
        "weight": torch.zeros(3, 4),
        "bias": torch.zeros(3),
    } | change
    for backend in ("auto", "onednn", "reference"):
        with pytest.raises(ValueError, match=message):
            linear(**arguments, backend=backend)
