"""The ten tests of an op (CONTRIBUTING.md), for folded_prior_injection. It has no backward pass: sampling only."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import native, prior_injection, use_backend
from javis.kernels.ops.folded_prior_injection.api import fold_prior, folded_prior_injection
from javis.kernels.ops.folded_prior_injection.cases import FoldedPriorCase
from javis.kernels.testing import assert_within_budget
from javis.kernels.triton_support import HAS_TRITON
from javis.model import ops as plain
from tests.kernels.calls import layouts, ops_that_ran, run_on_isa

needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
KERNELS = [pytest.param("cpu", marks=needs_native), pytest.param("triton", marks=needs_triton)]
BACKENDS = [*KERNELS, "reference"]
reference = partial(folded_prior_injection, backend="reference")
DTYPES = [torch.float32, torch.bfloat16]
RAN = {"cpu": ["javis_native::group_softmax_"], "triton": ["javis::folded_prior_weights"], "reference": []}

# One token and one key, odd numbers of everything, the group sizes that have loops of their own (8, 16, 32, 64), more
# groups than a tile of the Triton kernel has, more tokens than one of its tiles.
SHAPES = [
    {"batch": 1, "tokens": 1, "keys": 1, "heads": 1, "size": 3},
    {"batch": 2, "tokens": 37, "keys": 7, "heads": 11, "size": 4, "masked": True},
    {"batch": 2, "tokens": 5, "keys": 8, "heads": 4, "size": 32},
    {"batch": 1, "tokens": 9, "keys": 16, "heads": 3, "size": 24},
    {"batch": 2, "tokens": 133, "keys": 32, "heads": 2, "size": 40, "masked": True},
    {"batch": 1, "tokens": 3, "keys": 64, "heads": 2, "size": 9, "masked": True},
]


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> FoldedPriorCase:
    return FoldedPriorCase(name="test", dtype=dtype, **shape)


# 1. Budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_forward_is_within_budget(shape: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    args, kwargs = case(dtype, **shape).inputs(seed=1)
    actual = folded_prior_injection(*args, **kwargs, backend=backend)
    exact = reference(*(x.double() for x in args), **kwargs)
    assert_within_budget("o", actual, exact, plain.folded_prior_injection(*args, **kwargs))


@needs_native
def test_sums_of_the_full_size_model_are_within_budget() -> None:
    shape = {"batch": 1, "tokens": 160, "keys": 32, "heads": 16, "size": 72}
    test_forward_is_within_budget(shape, torch.float32, "cpu")


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_is_within_budget(isa: str) -> None:
    run_on_isa(
        isa,
        "import tests.kernels.test_folded_prior_injection as t\n"
        "for dtype in t.DTYPES:\n"
        "    for shape in t.SHAPES: t.test_forward_is_within_budget(shape, dtype, 'cpu')\n"
        "t.test_softmax_by_itself()\n",
    )


@needs_native
def test_softmax_by_itself() -> None:
    """The native loops without products around them, and that bfloat16 is rounded to nearest.

    A score is up to 87 below the largest; their difference is rounded to 2^-18, and that is the relative error.
    """
    scores = 30 * torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(2, 96, generator=torch.Generator().manual_seed(1))
    for groups in (1, 2, 3, 12, 32, 96):
        actual = scores.clone()
        torch.ops.javis_native.group_softmax_(actual, bias, groups)
        exact = (scores + bias[:, None]).double().unflatten(-1, (groups, -1)).softmax(-1).flatten(-2)
        torch.testing.assert_close(actual.double(), exact, rtol=2**-17, atol=1e-30)
        low = scores.bfloat16()
        wide = low.float()
        torch.ops.javis_native.group_softmax_(low, bias, groups)
        torch.ops.javis_native.group_softmax_(wide, bias, groups)
        assert torch.equal(low, wide.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str) -> None:
    y = torch.tensor([[[1.0], [-1.0], [0.0]]])
    out = folded_prior_injection(
        y, torch.tensor([[[5000.0, 0.0, -5000.0]]]), torch.zeros(1, 3), torch.tensor([[[1.0], [2.0], [4.0]]]), heads=1,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(out, torch.tensor([[[1.0], [4.0], [7 / 3]]]))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_without_keys_weighs_nothing(dtype: torch.dtype, backend: str) -> None:
    """A softmax over nothing is 0 in the kernels, not NaN; ``fold_prior`` itself never leaves a group without keys."""
    (y, weight, bias, value), kwargs = case(dtype, batch=1, tokens=3, keys=5, heads=2, size=4).inputs()
    bias[:, :5] = -float("inf")
    out = folded_prior_injection(y, weight, bias, value, **kwargs, backend=backend)
    alone = folded_prior_injection(y, weight[..., 5:], bias[:, 5:], value[:, 5:], heads=1, backend=backend)
    torch.testing.assert_close(out, alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_comes_through(dtype: torch.dtype, backend: str) -> None:
    (y, weight, bias, value), kwargs = case(dtype, batch=2, tokens=5, keys=3, heads=2, size=4).inputs()
    y[1, 2, 3] = float("nan")
    out = folded_prior_injection(y, weight, bias, value, **kwargs, backend=backend)
    expected = torch.zeros(2, 5, 8, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(out.isnan(), expected)
    value[0, 1, 4] = float("nan")
    expected[0, :, 4] = True
    out = folded_prior_injection(y, weight, bias, value, **kwargs, backend=backend)
    assert torch.equal(out.isnan(), expected)


@needs_native
def test_result_does_not_depend_on_threads() -> None:
    args, kwargs = case(batch=2, tokens=300, keys=8, heads=4, size=8).inputs()
    scores, bias = torch.bmm(args[0], args[1]), args[2]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(scores.clone())
            torch.ops.javis_native.group_softmax_(results[-1], bias, kwargs["heads"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# 2. to 4. Layouts, empty batches, registration ------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_give_the_same(backend: str) -> None:
    (y, weight, bias, value), kwargs = case(batch=2, tokens=5, keys=3, heads=2, size=12).inputs()
    expected = folded_prior_injection(y, weight, bias, value, **kwargs, backend=backend)
    transposed = weight.mT.contiguous().mT, bias.t().contiguous().t(), value.mT.contiguous().mT
    for name, layout in layouts(y).items():
        actual = folded_prior_injection(layout, *transposed, **kwargs, backend=backend)
        torch.testing.assert_close(actual, expected, msg=lambda m, name=name: f"{name}: {m}")
    shared = [t[:1].expand_as(t) for t in (weight, bias, value)]  # as prior_scope="batch" hands them over
    dense = folded_prior_injection(y, *(t.contiguous() for t in shared), **kwargs, backend=backend)
    torch.testing.assert_close(folded_prior_injection(y, *shared, **kwargs, backend=backend), dense)


@needs_triton
def test_nothing_outside_is_written() -> None:
    from javis.kernels.ops.folded_prior_injection import triton_impl

    (y, weight, bias, _), kwargs = case(batch=2, tokens=5, keys=3, heads=5, size=4).inputs()
    made, empty = [], torch.empty

    def guarded(shape: tuple[int, ...], **options: Any) -> Tensor:
        made.append(torch.full((torch.Size(shape).numel() + 20000,), 123.0, **options))
        return made[-1][10000:-10000].view(shape)

    torch.empty = guarded  # type: ignore[assignment]
    try:
        triton_impl.weights(y, weight, bias, **kwargs)
    finally:
        torch.empty = empty
    (buffer,) = made
    assert (buffer[:10000] == 123).all()
    assert (buffer[-10000:] == 123).all()
    assert (buffer[10000:-10000] <= 1).all()


@needs_native
def test_native_softmax_writes_its_scores_alone() -> None:
    buffer = torch.full((3, 2, 5, 21), 123.0)
    torch.ops.javis_native.group_softmax_(buffer[1], torch.zeros(2, 21), 3)
    assert (buffer[0] == 123).all()
    assert (buffer[2] == 123).all()
    torch.testing.assert_close(buffer[1], torch.full((2, 5, 21), 1 / 7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_nothing_to_do(batch: int, tokens: int, backend: str) -> None:
    args, kwargs = case(batch=batch, tokens=tokens, keys=3, heads=2, size=8).inputs()
    assert folded_prior_injection(*args, **kwargs, backend=backend).shape == (batch, tokens, 16)


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted: bool) -> None:
    (y, weight, bias, _), kwargs = case(batch=2, tokens=5, keys=3, heads=2, size=8).inputs()
    tests = ("test_schema", "test_faketensor")
    if native.WHY_NOT is None and not permuted:  # the op takes dense scores alone, which bmm returns
        args = (torch.bmm(y, weight), bias, kwargs["heads"])
        torch.library.opcheck(torch.ops.javis_native.group_softmax_.default, args, test_utils=tests)
    if HAS_TRITON:
        if permuted:
            y, weight = y.mT.contiguous().mT, weight.mT.contiguous().mT
        args = (y, weight, bias, kwargs["heads"])
        torch.library.opcheck(torch.ops.javis.folded_prior_weights.default, args, test_utils=tests)


@needs_native
def test_native_op_refuses_what_the_api_never_sends() -> None:
    op, scores = torch.ops.javis_native.group_softmax_, torch.zeros(2, 3, 8)
    for args, message in (
        ((scores[0], torch.zeros(2, 8), 2), "expected 3"),
        ((scores, torch.zeros(2, 8), 3), "not 3 groups"),
        ((scores, torch.zeros(2, 7), 2), "bias has size 7"),
        ((scores, torch.zeros(2, 8).double(), 2), "bias has the wrong dtype"),
        ((scores.double(), torch.zeros(2, 8), 2), "scores has the wrong dtype"),
        ((scores.mT, torch.zeros(2, 3), 1), "scores must be contiguous"),
        ((torch.zeros(1, 1, 1025), torch.zeros(1, 1025), 1), "at most 1024"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args)


# 5. torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiles_to_one_graph(backend: str) -> None:
    torch.compiler.reset()
    args, kwargs = case(batch=2, tokens=5, keys=3, heads=2, size=8).inputs()
    function = partial(folded_prior_injection, **kwargs, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), function(*args))
    chosen = backend if backend != "auto" else ("reference" if native.WHY_NOT is not None else "cpu")
    assert ops_that_ran(lambda: compiled(*args)) == RAN[chosen]


# 6. and 7. The choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_named_backend_is_the_one_that_runs(backend: str) -> None:
    args, kwargs = case(tokens=3, keys=2, heads=2, size=4).inputs()
    assert ops_that_ran(lambda: folded_prior_injection(*args, **kwargs, backend=backend)) == RAN[backend]
    with use_backend(backend):
        assert ops_that_ran(lambda: folded_prior_injection(*args, **kwargs)) == RAN[backend]
        assert ops_that_ran(lambda: reference(*args, **kwargs)) == []


@pytest.mark.parametrize(
    ("backend", "shape", "why"),
    [
        ("cpu", {"dtype": torch.float64}, "float64|not built"),
        ("cpu", {"dtype": torch.float16}, "float16|not built"),
        ("cpu", {"keys": 1025}, "at most 1024|not built"),
        ("triton", {"dtype": torch.float64}, "float64|not installed"),
        ("triton", {"keys": 129}, "at most 128|not installed"),
        ("sdpa", {}, "no such implementation"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, shape: dict[str, Any], why: str) -> None:
    args, kwargs = case(**({"tokens": 2, "heads": 1, "size": 8, "keys": 3} | shape)).inputs()
    with pytest.raises(UsageError, match=why):
        folded_prior_injection(*args, **kwargs, backend=backend)
    if "no such implementation" not in why:  # a default that an op does not have leaves it at auto
        with use_backend(backend), pytest.raises(UsageError, match=why):
            folded_prior_injection(*args, **kwargs)
    assert folded_prior_injection(*args, **kwargs).dtype == args[0].dtype


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_take_the_reference(backend: str) -> None:
    args, kwargs = case(tokens=3, keys=2, heads=2, size=4).inputs()
    args[0].requires_grad_()
    with pytest.raises(UsageError, match="no backward pass"):
        folded_prior_injection(*args, **kwargs, backend=backend)
    assert folded_prior_injection(*args, **kwargs).requires_grad
    with torch.no_grad():
        folded_prior_injection(*args, **kwargs, backend=backend)


# 8. The reference, and the folding itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_folding_is_exact(masked: bool) -> None:
    """Against projections and attention one after the other, in float64; a sample without keys gets the bias."""
    shape = case(torch.float64, batch=3, tokens=6, keys=5, heads=3, size=4, masked=masked)
    layer = shape.layer()
    if masked:
        layer["mask"][1] = False
    y = torch.randn(3, 6, 12, dtype=torch.float64)
    actual = reference(y, *fold_prior(**layer), heads=3)
    told = prior_injection(y @ layer["q_weight"].T + layer["q_bias"], layer["k"], layer["v"], mask=layer["mask"])
    torch.testing.assert_close(actual, told @ layer["out_weight"].T + layer["out_bias"], rtol=1e-12, atol=1e-12)
    no_bias = layer | {"q_bias": None, "out_bias": None}
    told = prior_injection(y @ layer["q_weight"].T, layer["k"], layer["v"], mask=layer["mask"])
    actual = reference(y, *fold_prior(**no_bias), heads=3)
    torch.testing.assert_close(actual, told @ layer["out_weight"].T, rtol=1e-12, atol=1e-12)


def test_folding_agrees_with_the_one_of_the_model() -> None:
    layer = case(batch=2, keys=5, heads=3, size=4).layer()
    for ours, models in zip(fold_prior(**layer), plain.fold_prior(*list(layer.values())[:6]), strict=True):
        assert torch.equal(ours, models)


def test_reference_gradients() -> None:
    args, kwargs = case(torch.float64, batch=2, tokens=3, keys=3, heads=2, size=2).inputs()
    leaves = [t.detach().requires_grad_() for t in args]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, **kwargs), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_by_hand(backend: str) -> None:
    """Two heads of three keys, one removed by its bias. Head one: scores y ln 3 and 0; head two: ln 1 and ln 4."""
    y = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
    ln = torch.tensor([3.0, 4.0]).log()
    weight = torch.zeros(1, 2, 6)
    weight[0, 0, 0] = ln[0]
    bias = torch.tensor([[0.0, 0.0, float("-inf"), 0.0, float("-inf"), ln[1]]])
    value = torch.tensor([[[4.0, 0.0], [0.0, 4.0], [9.0, 9.0], [10.0, 0.0], [9.0, 9.0], [0.0, 10.0]]])
    out = folded_prior_injection(y, weight, bias, value, heads=2, backend=backend)
    expected = torch.tensor([[[3.0 + 2.0, 1.0 + 8.0], [2.0 + 2.0, 2.0 + 8.0]]])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(5, 8)}, "y must be"),
        ({"scores_weight": torch.zeros(2, 7, 6)}, "scores_weight must be"),
        ({"scores_weight": torch.zeros(2, 8, 5)}, "H \\* M"),
        ({"heads": 4}, "heads = 4"),
        ({"scores_bias": torch.zeros(2, 5)}, "scores_bias must be"),
        ({"value": torch.zeros(2, 6, 7)}, "value must be"),
        ({"value": torch.zeros(2, 6, 8).half()}, "value must have the dtype of y"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "y": torch.zeros(2, 5, 8), "scores_weight": torch.zeros(2, 8, 6), "scores_bias": torch.zeros(2, 6),
        "value": torch.zeros(2, 6, 8), "heads": 2,
    } | change  # fmt: skip
    for backend in ("auto", "cpu", "triton", "reference"):
        with pytest.raises(ValueError, match=message):
            folded_prior_injection(**arguments, backend=backend)


# 10. On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_offsets_beyond_2_to_31() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs a GPU with 14 GiB free")
    from javis.kernels.ops.folded_prior_injection import triton_impl

    y = torch.zeros(1, 2**31 // 64 + 300, 64, dtype=torch.bfloat16, device="cuda")
    y[:, -4:] = torch.randn(4, 64, device="cuda")
    weight, bias = torch.randn(1, 64, 32, dtype=torch.bfloat16, device="cuda"), torch.zeros(1, 32, device="cuda")
    few = triton_impl.weights(y[:, -4:].clone(), weight, bias, 1)
    torch.testing.assert_close(triton_impl.weights(y, weight, bias, 1)[:, -4:], few)
