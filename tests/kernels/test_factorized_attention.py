"""The numbers of factorized_attention: tests 1, 8 and 10 of an op (CONTRIBUTING.md, "Adding an op").

The others are in test_factorized_attention_calls.py, test 9 in tests/test_imports.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.bench import check
from javis.kernels import native
from javis.kernels.ops.factorized_attention.api import factorized_attention
from javis.kernels.ops.factorized_attention.cases import FactorizedAttentionCase
from javis.kernels.testing import assert_within_budget
from javis.kernels.triton_support import HAS_TRITON
from javis.model.ops import ModelOps
from tests.kernels.calls import run_on_isa, with_gradients

needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
NATIVE = pytest.param("cpu", marks=needs_native)
TRITON = pytest.param("triton", marks=needs_triton)
DTYPES = [torch.float32, torch.bfloat16]

# One frame, odd sizes, heads in one padded tile (8, 6), in two (72 = 64 + 8, 24 = 16 + 8), in one full one (16).
TEMPORAL: list[dict[str, Any]] = [
    {"batch": 1, "frames": 1, "places": 1, "heads": 1, "size": 8, "rope": True},
    {"batch": 2, "frames": 5, "places": 3, "heads": 1, "size": 72, "rope": True},
    {"batch": 1, "frames": 17, "places": 2, "heads": 2, "size": 24, "norm": False, "rope": True},
    {"batch": 1, "frames": 3, "places": 1, "heads": 3, "size": 16},
    {"batch": 1, "frames": 3, "places": 2, "heads": 1, "size": 6, "norm": False},
]
# Short sequences of the other axis; two blocks of queries, three of keys and a remainder, with a norm and with nothing
# done before; frames as sequences longer than one tile.
SPATIAL: list[dict[str, Any]] = [
    {"axis": "spatial", "batch": 2, "frames": 2, "places": 5, "heads": 2, "size": 24},
    {"axis": "spatial", "batch": 1, "frames": 1, "places": 130, "heads": 1, "size": 72},
    {"axis": "spatial", "batch": 1, "frames": 1, "places": 141, "heads": 2, "size": 16, "norm": False},
    {"axis": "temporal", "batch": 1, "frames": 131, "places": 2, "heads": 1, "size": 24, "rope": True},
]


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> FactorizedAttentionCase:
    return FactorizedAttentionCase(name="test", dtype=dtype, **shape)


def results(
    function: Callable[..., Tensor], made: FactorizedAttentionCase, dtype: torch.dtype | None = None, seed: int = 1
) -> dict[str, Tensor]:
    """Output and gradients of qkv and of the weights, where the case has some."""
    (qkv, axis), kwargs = made.inputs(seed=seed)
    return run(function, qkv, axis, kwargs, dtype)


def run(
    function: Callable[..., Tensor], qkv: Tensor, axis: str, kwargs: dict[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    weights = [name for name in ("q_weight", "k_weight") if name in kwargs]

    def call(qkv: Tensor, *given: Tensor) -> Tensor:
        return function(qkv, axis, **dict(zip(weights, given, strict=True)), rope=kwargs.get("rope"))

    return with_gradients(call, ["qkv", *weights], [qkv, *(kwargs[name] for name in weights)], dtype=dtype)


def op(backend: str) -> Callable[..., Tensor]:
    return partial(factorized_attention, backend=backend)


# 1. Budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TEMPORAL, ids=lambda s: "-".join(map(str, s.values())))
def test_temporal_is_within_budget(shape: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    made = case(dtype, **shape)
    exact = results(op("reference"), made, torch.float64)
    # The native kernel keeps float32 inside; Triton and libraries round q, k and the probabilities for the products, as
    # plain PyTorch does.
    same_dtype = results(op("reference") if backend == "cpu" else ModelOps().factorized_attention, made)
    for name, value in results(op(backend), made).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SPATIAL, ids=lambda s: "-".join(map(str, s.values())))
def test_spatial_is_within_budget(shape: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    made = case(dtype, **shape)
    exact = results(op("reference"), made, torch.float64)
    same_dtype = results(ModelOps().factorized_attention, made)
    for name, value in results(op(backend), made).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spatial_gradients_pass_the_gate_of_the_benchmarks(dtype: torch.dtype) -> None:
    """Full size, compared with float32 inside; the float32 gradients of PyTorch's attention do not pass it."""
    made = case(dtype, axis="spatial", batch=1, frames=4, places=405, heads=16, size=72)
    check("factorized_attention", made, {"cpu": op("cpu")})


@needs_native
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_at_other_lengths(dtype: torch.dtype) -> None:
    """A full tile, more than one, many places of the sums for the weights, a head wider than any vector."""
    for shape in ((1, 16, 2, 2, 80), (1, 40, 1, 1, 128), (2, 2, 300, 2, 10), (1, 129, 1, 1, 4)):
        sizes = dict(zip(("batch", "frames", "places", "heads", "size"), shape, strict=True))
        made = case(dtype, rope=True, **sizes)
        exact, same_dtype = results(op("reference"), made, torch.float64), results(op("reference"), made)
        for name, value in results(op("cpu"), made).items():
            assert_within_budget(f"{shape} {name}", value, exact[name], same_dtype[name])


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_is_within_budget(isa: str) -> None:
    run_on_isa(
        isa,
        "import tests.kernels.test_factorized_attention as t\n"
        "for dtype in t.DTYPES:\n"
        "    t.test_native_at_other_lengths(dtype)\n"
        "    for shape in t.TEMPORAL: t.test_temporal_is_within_budget(shape, dtype, 'cpu')\n",
    )


@needs_triton
def test_float16_is_within_budget() -> None:
    made = case(torch.float16, frames=5, places=2, heads=1, size=24, rope=True)
    exact, same_dtype = results(op("reference"), made, torch.float64), results(ModelOps().factorized_attention, made)
    for name, value in results(op("triton"), made).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa", "reference"])
def test_large_scores_do_not_overflow(backend: str) -> None:
    """Scores of some thousands without a norm: the softmax is one key."""
    (qkv, axis), _ = case(frames=4, places=1, heads=1, size=16).inputs()
    y = factorized_attention(qkv * 200, axis, backend=backend)
    q, k, v = (200 * qkv[0, :, 0, part, 0] for part in range(3))
    torch.testing.assert_close(y[0], v[(q @ k.T).argmax(1)])


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa", "reference"])
def test_large_scores_of_long_sequences_do_not_overflow(backend: str) -> None:
    """The same over three blocks of keys: the one key may be in the first, with far smaller scores after it."""
    (qkv, axis), _ = case(axis="spatial", frames=1, places=130, heads=1, size=16).inputs()
    y = factorized_attention(qkv * 200, axis, backend=backend)
    q, k, v = (200 * qkv[0, 0, :, part, 0] for part in range(3))
    which = (q @ k.T).argmax(1)
    assert (which < 64).any() and (which >= 64).any()
    torch.testing.assert_close(y[0], v[which])


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "reference"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_comes_through_and_stays_in_its_head(backend: str, part: int) -> None:
    (qkv, axis), kwargs = case(frames=3, places=2, heads=2, size=8, rope=True).inputs()
    qkv[0, 1, 0, part, 1, 3] = float("nan")
    y = factorized_attention(qkv, axis, **kwargs, backend=backend).view(3, 2, 2, 8)
    touched = torch.zeros(3, 2, 2, 8, dtype=torch.bool)
    touched[1 if part == 0 else slice(None), 0, 1, 3 if part == 2 else slice(None)] = True
    assert torch.equal(y.isnan(), touched)


@needs_native
def test_native_result_does_not_depend_on_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(op("cpu"), case(batch=2, frames=4, places=37, heads=2, size=24, rope=True)))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        assert torch.equal(value, found[2][name]), name


@needs_native
def test_native_rounds_bfloat16_to_nearest() -> None:
    (qkv, axis), kwargs = case(torch.bfloat16, frames=7, places=2, heads=1, size=24, rope=True).inputs()
    wide = {name: value.float() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    expected = factorized_attention(qkv.float(), axis, **wide, backend="cpu").bfloat16()
    assert torch.equal(factorized_attention(qkv, axis, **kwargs, backend="cpu"), expected)


# 8. The reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_reference_gradients(axis: str) -> None:
    (qkv, _), kwargs = case(torch.float64, axis=axis, frames=2, places=2, heads=1, size=4, rope=True).inputs()
    leaves = [t.requires_grad_() for t in (qkv, kwargs["q_weight"], kwargs["k_weight"])]

    def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        return factorized_attention(
            qkv, axis, q_weight=q_weight, k_weight=k_weight, rope=kwargs["rope"], backend="reference"
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa", "reference"])
def test_case_by_hand(backend: str) -> None:
    """Two frames, D = 4. With norm weights (1, ...), q = (1, 1, 1, 1) and k = (1, 1, 1, 1), (-3, ...) are normalised to
    +1 and -1 everywhere: scores 4 / sqrt(4) = 2 and -2, so the first key weighs 1 / (1 + exp(-4))."""
    qkv = torch.zeros(1, 2, 1, 3, 1, 4)
    qkv[0, :, 0, 0] = 1.0
    qkv[0, 0, 0, 1], qkv[0, 1, 0, 1] = 1.0, -3.0
    qkv[0, 0, 0, 2], qkv[0, 1, 0, 2] = torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7, 8])
    ones = torch.ones(4)
    y = factorized_attention(qkv, "temporal", q_weight=ones, k_weight=ones, eps=0.0, backend=backend)
    first = 1 / (1 + math.exp(-4))
    expected = first * torch.tensor([1.0, 2, 3, 4]) + (1 - first) * torch.tensor([5.0, 6, 7, 8])
    torch.testing.assert_close(y, expected.expand(1, 2, 4), rtol=0, atol=1e-5)
    # A quarter turn of the second frame's pairs: its key is then perpendicular to the query of the first frame.
    rope = (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    y = factorized_attention(qkv, "temporal", q_weight=ones, k_weight=ones, rope=rope, eps=0.0, backend=backend)
    first = 1 / (1 + math.exp(-2))
    expected = first * torch.tensor([1.0, 2, 3, 4]) + (1 - first) * torch.tensor([5.0, 6, 7, 8])
    torch.testing.assert_close(y[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", [NATIVE, TRITON, "sdpa", "reference"])
def test_time_and_place_are_told_apart(backend: str) -> None:
    """Equal keys make the output the mean of the values along the axis; the values say where they are from."""
    qkv = torch.zeros(1, 2, 3, 3, 1, 8)
    qkv[0, :, :, 2, 0] = (10 * torch.arange(2)[:, None] + torch.arange(3))[:, :, None].float()
    y = factorized_attention(qkv, "temporal", backend=backend)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([5.0, 6, 7, 5, 6, 7]))
    y = factorized_attention(qkv, "spatial", backend=backend)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([1.0, 1, 1, 11, 11, 11]))


# 10. On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_offsets_beyond_two_to_the_31(axis: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    length = 2**31 // (3 * 16 * 72) // 16 + 8
    frames, places = (16, length) if axis == "temporal" else (length, 16)
    qkv = torch.randn(1, frames, places, 3, 16, 72, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    y = factorized_attention(qkv, axis, backend="triton").view(frames, places, -1)
    last = (slice(None), slice(-1, None)) if axis == "temporal" else (slice(-1, None), slice(None))
    expected = factorized_attention(qkv[:, last[0], last[1]], axis, backend="reference")
    torch.testing.assert_close(y[last].reshape(expected.shape), expected, rtol=2e-2, atol=2e-2)
