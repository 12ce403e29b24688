"""The tests of an op (CONTRIBUTING.md, "Adding an op") for the native attention that text_cross_attention and the
spatial axis of factorized_attention have on a CPU. What is written outside the results is tested in test_borders.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import dense_attention as dense
from javis.kernels import native
from javis.kernels.backend import Backend, why_not_auto
from javis.kernels.ops.factorized_attention.api import factorized_attention
from javis.kernels.ops.factorized_attention.cases import FactorizedAttentionCase
from javis.kernels.ops.text_cross_attention import api
from javis.kernels.ops.text_cross_attention.api import text_cross_attention
from javis.kernels.ops.text_cross_attention.cases import TextCrossAttentionCase
from javis.kernels.testing import assert_within_budget
from javis.model.ops import ModelOps
from tests.kernels.calls import layouts, ops_that_ran, run_on_isa, with_gradients

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("q", "k", "v")
NAME = "javis_native::dense_attention"
cpu = partial(text_cross_attention, backend="cpu")
reference = partial(text_cross_attention, backend="reference")
# tokens, keys, heads, size: one of each; odd everything; a full block of keys, one key more, two blocks and more; one
# query more than a block; heads of no multiple of anything, and of 128; chunks of queries; the full-size axes.
SHAPES = [
    (1, 1, 1, 1), (70, 5, 2, 7), (37, 19, 2, 72), (64, 126, 1, 72), (65, 127, 1, 16), (20, 253, 3, 33),
    (49, 300, 2, 72), (15, 3, 1, 128), (17, 9, 1, 97), (1030, 2, 1, 8), (16, 1024, 1, 72), (33, 3600, 1, 10),
]  # fmt: skip


def case(dtype: torch.dtype, shape: tuple[int, ...], masked: bool = False, batch: int = 1) -> TextCrossAttentionCase:
    sizes = dict(zip(("tokens", "keys", "heads", "size"), shape, strict=True))
    return TextCrossAttentionCase(name="test", dtype=dtype, masked=masked, batch=batch, **sizes)


def wide(args: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [arg.to(dtype) for arg in args]


# 1. Budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_within_budget(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
    args, kwargs = case(dtype, shape, masked, batch=2 if masked else 1).inputs(seed=1)
    same_dtype = ModelOps().text_cross_attention(*args, **kwargs)
    assert_within_budget("y", cpu(*args, **kwargs), reference(*wide(args), **kwargs), same_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_within_budget(dtype: torch.dtype) -> None:
    args, kwargs = case(dtype, (37, 19, 2, 24), True, batch=3).inputs(seed=1)
    exact = with_gradients(reference, NAMES, args, kwargs, torch.float64)
    same_dtype = with_gradients(ModelOps().text_cross_attention, NAMES, args, kwargs)
    for name, value in with_gradients(cpu, NAMES, args, kwargs).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_where_keys_or_whole_captions_are_absent(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head at a time; numbers at absent keys never count, a sample without a key has no gradient at all."""
    monkeypatch.setattr(dense, "_SCORES", 1)
    (q, k, v), kwargs = case(dtype, (9, 7, 3, 8), True, batch=3).inputs()
    mask = kwargs["mask"]
    mask[0], mask[1] = True, False
    mask[2, 3:] = False
    clean = with_gradients(reference, NAMES, (q, k, v), kwargs, torch.float64)
    same_dtype = with_gradients(ModelOps().text_cross_attention, NAMES, (q, k, v), kwargs)
    k, v = (x.masked_fill(~mask[:, None, :, None], math.nan) for x in (k, v))
    found = with_gradients(cpu, NAMES, (q, k, v), kwargs)
    for name, value in found.items():
        assert_within_budget(name, value, clean[name], same_dtype[name])
        assert name == "y" or (value[1] == 0).all()
    assert (found["dk"].transpose(1, 2)[~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", ["spatial"])
def test_spatial_axis_is_within_budget(axis: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "why_not_auto", lambda *_: None)  # on every processor
    made = FactorizedAttentionCase(name="test", dtype=dtype, axis=axis, batch=2, frames=2, places=131, heads=2, size=72)
    (qkv, _), kwargs = made.inputs()
    run = partial(factorized_attention, axis=axis, **kwargs)
    found: list[Tensor] = []
    assert NAME in ops_that_ran(lambda: found.append(run(qkv, backend="cpu")))
    exact = factorized_attention(qkv.double(), axis, **{k: w.double() for k, w in kwargs.items()}, backend="reference")
    assert_within_budget("y", found[0], exact, ModelOps().factorized_attention(qkv, axis, **kwargs))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set(isa: str) -> None:
    """Without products of bfloat16: values are widened, so that the results are those of float32, rounded."""
    run_on_isa(
        isa,
        "import torch; import tests.kernels.test_dense_attention as t\n"
        "assert not t.native.multiplies_bf16()\n"
        "for shape in t.SHAPES[:-2]:\n"
        "    for dtype in t.DTYPES: t.test_is_within_budget(shape, dtype, True)\n"
        "    args, _ = t.case(torch.bfloat16, shape).inputs()\n"
        "    assert torch.equal(t.cpu(*args), t.cpu(*t.wide(args, torch.float32)).bfloat16()), shape\n"
        "t.test_large_scores(torch.float32); t.test_nan_stays_in_its_row(torch.bfloat16)\n",
    )


# Numbers in closed form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_case_by_hand(dtype: torch.dtype) -> None:
    """D = 4, q = (1, 1, 1, 1), keys of ones and of minus ones: scores 2 and -2; the first weighs 1 / (1 + exp(-4))."""
    q, k = torch.ones(1, 1, 4, dtype=dtype), torch.ones(1, 1, 2, 4, dtype=dtype)
    k[0, 0, 1] = -1
    v = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]], dtype=dtype)[None, None]
    first = 1 / (1 + math.exp(-4))
    expected = first * torch.tensor([1.0, 2, 3, 4]) + (1 - first) * torch.tensor([5.0, 6, 7, 8])
    rtol = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(cpu(q, k, v)[0, 0].float(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    """Scores of some thousands: the softmax is one key, seldom two, which may be in any of three blocks."""
    (q, k, v), _ = case(dtype, (130, 300, 1, 72)).inputs()
    y, exact = cpu(q * 128, k * 128, v), reference(*wide((q * 128, k * 128, v)))
    which = (q[0].double() @ k[0, 0].double().T).argmax(1)
    assert {int(i) // 100 for i in which} == {0, 1, 2}
    assert (exact[0] - v[0, 0, which]).abs().amax(1).lt(1e-2).float().mean() > 0.9
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_scores(dtype: torch.dtype) -> None:
    """-inf: no weight, even if a whole block of keys has it; the mean of the others, whose scores are equal."""
    (q, k, v), _ = case(dtype, (3, 300, 1, 8)).inputs()
    q, k = torch.ones_like(q), torch.zeros_like(k)
    k[:, :, :130, 0] = -math.inf
    torch.testing.assert_close(cpu(q, k, v)[0, 0].float(), v[0, 0, 130:].float().mean(0), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 5, 7, 127])
def test_scores_far_below_zero(keys: int, dtype: torch.dtype) -> None:
    """Equal scores of -1448 give the mean of the values: what fills up the last rows of keys must not count."""
    q, k = torch.ones(1, 3, 8, dtype=dtype), torch.full((1, 1, keys, 8), -512.0, dtype=dtype)
    v = torch.arange(keys, dtype=dtype)[None, None, :, None].expand(1, 1, keys, 8)
    torch.testing.assert_close(cpu(q, k, v), torch.full_like(q, (keys - 1) / 2), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    """A query's in its row and head; a key's in all rows of its head; a value's in its column. No masked key is."""
    (q, k, v), _ = case(dtype, (70, 131, 2, 9), batch=2).inputs()
    for part, index, touched in (
        (0, (1, 66, 11), (1, 66, slice(9, 18))),
        (1, (0, 1, 129, 3), (0, slice(None), slice(9, 18))),
        (2, (0, 1, 129, 3), (0, slice(None), 12)),
    ):
        args = [q.clone(), k.clone(), v.clone()]
        args[part][index] = math.nan
        expected = torch.zeros(q.shape, dtype=torch.bool)
        expected[touched] = True
        assert torch.equal(cpu(*args).isnan(), expected), NAMES[part]
        if part > 0:
            mask = torch.ones(2, 131, dtype=torch.bool)
            mask[:, 129] = False
            assert cpu(*args, mask=mask).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_caption_counts_by_itself(dtype: torch.dtype) -> None:
    """With holes: what the kept keys give alone, bit for bit; a sample without a key gets zeros."""
    (q, k, v), _ = case(dtype, (5, 160, 2, 24), batch=3).inputs()
    mask = torch.rand(3, 160, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[1] = False
    y = cpu(q, k, v, mask=mask)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    for b in (0, 2):
        alone = cpu(q[b : b + 1], k[b : b + 1, :, mask[b]], v[b : b + 1, :, mask[b]])
        assert torch.equal(y[b : b + 1], alone)


def test_result_does_not_depend_on_threads() -> None:
    args, kwargs = case(torch.bfloat16, (1100, 37, 3, 24), True, batch=2).inputs()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(cpu(*args, **kwargs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# 2. to 5. Layouts, empty batches, registration, torch.compile ---------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_empty_batches(dtype: torch.dtype) -> None:
    (q, k, v), kwargs = case(dtype, (5, 3, 2, 8), True, batch=2).inputs()
    expected = cpu(q, k.contiguous(), v.contiguous(), **kwargs)
    for name, layout in layouts(q).items():
        assert torch.equal(cpu(layout, k.transpose(2, 3).contiguous().transpose(2, 3), v, **kwargs), expected), name
    shared = cpu(q, k[:1].expand_as(k), v[:1].expand_as(v))  # samples of stride 0
    assert torch.equal(shared, cpu(q, k[:1].repeat(2, 1, 1, 1), v[:1].repeat(2, 1, 1, 1)))
    for batch, tokens in ((0, 5), (2, 0)):
        empty = torch.zeros(batch, tokens, 16, dtype=dtype)
        assert cpu(empty, k[:batch], v[:batch]).shape == (batch, tokens, 16)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    (q, k, v), kwargs = case(torch.bfloat16, (5, 3, 2, 8), masked, batch=2).inputs()
    permuted = q.unflatten(-1, (2, 8)), k.transpose(1, 2), v.transpose(1, 2)
    for args in (permuted, [x.contiguous() for x in permuted]):
        torch.library.opcheck(
            torch.ops.javis_native.dense_attention.default, (*args, kwargs.get("mask")),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(masked: bool) -> None:
    torch.compiler.reset()
    args, kwargs = case(torch.bfloat16, (5, 3, 2, 8), masked, batch=2).inputs()
    for run in (cpu, text_cross_attention):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*args, **kwargs), run(*args, **kwargs))


def test_native_op_refuses_what_the_api_never_sends() -> None:
    op = torch.ops.javis_native.dense_attention
    q, k = torch.zeros(2, 5, 3, 8), torch.zeros(2, 4, 3, 8)
    for args, message in (
        ((q[0], k, k, None), "q must be"),
        ((q.half(), k, k, None), "float32 or bfloat16"),
        ((q, k[:1], k, None), "k has size 1"),
        ((q, k, k[:, :3], None), "v has size 3"),
        ((q, k[:, :0], k[:, :0], None), "no keys"),
        ((q, k.bfloat16(), k, None), "k has the wrong dtype"),
        ((q, k, k, torch.ones(2, 5, dtype=torch.bool)), "mask has size 5"),
        ((q, k, k, torch.ones(2, 4)), "mask has the wrong dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args)


# 6. and 7. The choice -------------------------------------------------------------------------------------------------


def test_the_named_backend_is_the_one_that_runs() -> None:
    args, _ = case(torch.bfloat16, (3, 2, 1, 8)).inputs()
    assert ops_that_ran(lambda: cpu(*args)) == [NAME]
    takes = dense.why_not_auto(*args) is None
    assert ops_that_ran(lambda: text_cross_attention(*args)) == ([NAME] if takes else [])
    assert ops_that_ran(lambda: text_cross_attention(args[0].requires_grad_(), *args[1:])) == []


def call(run: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    return run(*case(dtype, (2, 3, 1, 8)).inputs()[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes_without_a_kernel(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match="no float(16|64) kernel"):
        call(cpu, dtype)
    assert call(text_cross_attention, dtype).dtype == dtype


def test_heads_too_large() -> None:
    args, _ = case(torch.float32, (2, 3, 1, 129)).inputs()
    with pytest.raises(UsageError, match="heads of 129 values, at most 128"):
        cpu(*args)


def test_autocast_is_left_to_pytorch() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UsageError, match="autocast"):
            call(cpu, torch.float32)
        assert call(text_cross_attention, torch.float32).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "dtype", "why"),
    [
        ({}, torch.bfloat16, None),
        ({}, torch.float32, None),
        ({"_ISA": "avx2"}, torch.float32, "without AVX-512"),
        ({"_HAS_AMX": True}, torch.bfloat16, "AMX"),
        ({"_HAS_AMX": True}, torch.float32, None),
        ({"_MULTIPLIES_BF16": False}, torch.bfloat16, "AVX512_BF16"),
        ({"_MULTIPLIES_BF16": False}, torch.float32, None),
        ({"gradient": True}, torch.float32, "a gradient is wanted"),
    ],
)
def test_when_auto_takes_it(
    change: dict[str, Any], dtype: torch.dtype, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor: dict[str, Any] = {"_ISA": "avx512", "_HAS_AMX": False, "_MULTIPLIES_BF16": True} | change
    gradient = processor.pop("gradient", False)
    for name, value in processor.items():
        monkeypatch.setattr(dense, name, value)
    (q, k, v), _ = case(dtype, (2, 3, 1, 8)).inputs()
    reason = why_not_auto(api.CHECKS, Backend.CPU, q.requires_grad_(gradient), k, v, None)
    assert reason is None if why is None else why in str(reason)
