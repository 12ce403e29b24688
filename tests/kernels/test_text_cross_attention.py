"""The tests of an op (CONTRIBUTING.md, "Adding an op"), for text_cross_attention: a choice between libraries.

Its native backend is tested in test_dense_attention.py.
What it shares with prior_injection (the sdpa backend, the reference and its gradients) is tested there as well.
"""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import use_backend
from javis.kernels.ops.text_cross_attention import contract
from javis.kernels.ops.text_cross_attention.api import text_cross_attention
from javis.kernels.ops.text_cross_attention.cases import TextCrossAttentionCase
from javis.kernels.testing import assert_within_budget
from javis.model.ops import ModelOps
from tests.kernels.calls import layouts, ops_that_ran, with_gradients

reference = partial(text_cross_attention, backend="reference")
sdpa = partial(text_cross_attention, backend="sdpa")
NAMES = ("q", "k", "v")
SHAPES = [
    {"batch": 1, "tokens": 1, "keys": 1, "heads": 1, "size": 3},
    {"batch": 3, "tokens": 37, "keys": 19, "heads": 2, "size": 72, "masked": True},
    {"batch": 1, "tokens": 40, "keys": 300, "heads": 2, "size": 16},
]


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> TextCrossAttentionCase:
    return TextCrossAttentionCase(name="test", dtype=dtype, **shape)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_forward_and_gradients_are_within_budget(shape: dict[str, Any], dtype: torch.dtype) -> None:
    args, kwargs = case(dtype, **shape).inputs(seed=1)
    actual = with_gradients(sdpa, NAMES, args, kwargs)
    exact = with_gradients(reference, NAMES, args, kwargs, torch.float64)
    for name, value in with_gradients(ModelOps().text_cross_attention, NAMES, args, kwargs).items():
        assert_within_budget(name, actual[name], exact[name], value)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_each_caption_counts_by_itself(backend: str) -> None:
    """A caption among longer ones gives what it gives alone and unpadded."""
    (q, k, v), kwargs = case(batch=3, tokens=5, keys=7, heads=2, size=8, masked=True).inputs()
    out = text_cross_attention(q, k, v, **kwargs, backend=backend)
    for b, length in enumerate(kwargs["mask"].sum(1).tolist()):
        alone = reference(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        torch.testing.assert_close(out[b : b + 1], alone)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_layouts_and_empty_batches(backend: str) -> None:
    run = partial(text_cross_attention, backend=backend)
    (q, k, v), kwargs = case(batch=2, tokens=5, keys=3, heads=2, size=8, masked=True).inputs()
    expected = run(q, k.contiguous(), v.contiguous(), **kwargs)
    for layout in layouts(q).values():
        torch.testing.assert_close(run(layout, k, v, **kwargs), expected)
    args, _ = case(batch=0, tokens=5, keys=3, heads=2, size=8).inputs()
    assert with_gradients(run, NAMES, args)["y"].shape == (0, 5, 16)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiles_to_one_graph(dtype: torch.dtype, masked: bool) -> None:
    torch.compiler.reset()
    args, kwargs = case(dtype, batch=2, tokens=5, keys=3, heads=1, size=16, masked=masked).inputs()
    compiled = torch.compile(text_cross_attention, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, NAMES, args, kwargs)
    for name, value in with_gradients(text_cross_attention, NAMES, args, kwargs).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_the_named_backend_is_the_one_that_runs() -> None:
    args, kwargs = case(tokens=3, keys=2, heads=1, size=8, masked=True).inputs()
    name = "aten::scaled_dot_product_attention"
    wanted = [args[0].requires_grad_(), *args[1:]]  # without a gradient auto may take the native attention
    assert ops_that_ran(lambda: text_cross_attention(*wanted, **kwargs), prefix=name)[:1] == [name]
    for run, expected in ((sdpa, [name]), (reference, [])):
        assert ops_that_ran(lambda run=run: run(*args, **kwargs), prefix=name)[:1] == expected
    with use_backend("reference"):
        assert ops_that_ran(lambda: text_cross_attention(*args, **kwargs), prefix=name) == []


@pytest.mark.parametrize(
    ("backend", "dtype", "why"),
    [
        ("flash_attn", torch.bfloat16, "not installed|needs a CUDA device"),
        ("sdpa", torch.float64, "float64"),
        ("triton", torch.float32, "no such implementation"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, why: str) -> None:
    args, _ = case(dtype, tokens=2, keys=3, heads=1, size=8).inputs()
    with pytest.raises(UsageError, match=why):
        text_cross_attention(*args, backend=backend)
    if "no such implementation" not in why:  # a default that an op does not have leaves it at auto
        with use_backend(backend), pytest.raises(UsageError, match=why):
            text_cross_attention(*args)
    assert text_cross_attention(*args).dtype == dtype


def varlen(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """What flash_attn_varlen_func promises: sequence i is rows ends[i] to ends[i + 1]; all [rows, H, D]."""
    out = []
    for i in range(len(q_ends) - 1):
        own, seen = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        assert own.stop - own.start <= longest_q
        assert 0 < seen.stop - seen.start <= longest_k
        heads_first = (x.transpose(0, 1) for x in (q[own], k[seen], v[seen]))
        out.append(F.scaled_dot_product_attention(*heads_first).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("masked", [False, True])
def test_flash_attn_gets_packed_captions(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package needs a GPU; a stand-in with its documented behaviour shows that the call is packed as it expects.
    The mask has holes, not ends alone."""
    stand_in = ModuleType("flash_attn")
    stand_in.flash_attn_func = lambda q, k, v: F.scaled_dot_product_attention(  # type: ignore[attr-defined]
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    stand_in.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    args, _ = case(batch=3, tokens=5, keys=4, heads=2, size=8).inputs()
    rows = [[True, False, True, True], [False, False, True, False], [True, True, True, True]]
    kwargs = {"mask": torch.tensor(rows)} if masked else {}
    actual = with_gradients(lambda *a: contract.attention_flash(*a, kwargs.get("mask")), NAMES, args)
    for name, value in with_gradients(reference, NAMES, args, kwargs).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["auto", "flash_attn", "sdpa", "reference"])
def test_bad_arguments(backend: str) -> None:
    q, k = torch.zeros(2, 5, 8), torch.zeros(2, 2, 3, 4)
    for args, mask, message in (
        ((q[0], k, k), None, "q must be"),
        ((q, k[:, :1], k), None, "k must be"),
        ((q, k, k[:, :, :2]), None, "v must have the shape of k"),
        ((q, k, k), torch.ones(2, 4, dtype=torch.bool), "mask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            text_cross_attention(*args, mask=mask, backend=backend)
