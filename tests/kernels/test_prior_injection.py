"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for prior_injection. Test 9 is in tests/test_imports.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import use_backend
from javis.kernels.ops.prior_injection.api import prior_injection
from javis.kernels.ops.prior_injection.cases import CrossAttentionCase
from javis.kernels.testing import assert_within_budget
from javis.kernels.triton_support import HAS_TRITON
from javis.model.ops import ModelOps
from tests.kernels.calls import layouts, ops_that_ran, with_gradients

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
BACKENDS = [pytest.param("triton", marks=needs_triton), "sdpa"]
triton_op = partial(prior_injection, backend="triton")
reference = partial(prior_injection, backend="reference")
NAMES = ("q", "k", "v")
DTYPES = [torch.float32, torch.bfloat16]
BOTH = ["javis::prior_injection", "javis::prior_injection_backward"]

# One token and one key, odd sizes, heads in two tiles (72 = 64 + 8, 24 = 16 + 8) or in one padded one, more tokens than
# one chunk (512) of the gradient sums, masks that remove keys.
SHAPES = [
    {"batch": 1, "tokens": 1, "keys": 1, "heads": 1, "size": 3},
    {"batch": 2, "tokens": 37, "keys": 7, "heads": 2, "size": 72, "masked": True},
    {"batch": 1, "tokens": 33, "keys": 33, "heads": 1, "size": 24},
    {"batch": 1, "tokens": 700, "keys": 4, "heads": 1, "size": 16},
]


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> CrossAttentionCase:
    return CrossAttentionCase(name="test", dtype=dtype, **shape)


# 1. Budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_forward_and_gradients_are_within_budget(shape: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    args, kwargs = case(dtype, **shape).inputs(seed=1)
    actual = with_gradients(partial(prior_injection, backend=backend), NAMES, args, kwargs)
    exact = with_gradients(reference, NAMES, args, kwargs, torch.float64)
    same_dtype = with_gradients(ModelOps().prior_injection, NAMES, args, kwargs)
    for name, value in actual.items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


@needs_triton
def test_float16_is_within_budget() -> None:
    args, kwargs = case(torch.float16, batch=1, tokens=9, keys=5, heads=1, size=24, masked=True).inputs()
    actual = with_gradients(triton_op, NAMES, args, kwargs)
    exact = with_gradients(reference, NAMES, args, kwargs, torch.float64)
    for name, value in with_gradients(reference, NAMES, args, kwargs).items():
        assert_within_budget(name, actual[name], exact[name], value)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_large_scores_do_not_overflow(backend: str) -> None:
    """Scores of some thousands: the softmax is one key."""
    q = torch.tensor([[[200.0] * 4], [[-200.0] * 4]])
    k = torch.tensor([-3.0, 1.0, 2.0]).view(1, 1, 3, 1).expand(2, 1, 3, 4).contiguous()
    v = torch.arange(12.0).view(1, 1, 3, 4).expand(2, 1, 3, 4).contiguous()
    out = prior_injection(q, k, v, backend=backend)
    torch.testing.assert_close(out[:, 0], torch.stack((v[0, 0, 2], v[0, 0, 0])), rtol=0, atol=0)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_comes_through(dtype: torch.dtype, backend: str) -> None:
    run = partial(prior_injection, backend=backend)
    (q, k, v), _ = case(dtype, batch=2, tokens=5, keys=3, heads=2, size=8).inputs()
    bad = q.clone()
    bad[1, 2, 3] = float("nan")  # first head of one token
    expected = torch.zeros(2, 5, 16, dtype=torch.bool)
    expected[1, 2, :8] = True
    assert torch.equal(run(bad, k, v).isnan(), expected)
    for which in range(2):
        args = [q, k.clone(), v.clone()]
        args[1 + which][0, 1] = float("nan")  # all keys, or all values, of one head
        expected = torch.zeros(2, 5, 16, dtype=torch.bool)
        expected[0, :, 8:] = True
        assert torch.equal(run(*args).isnan(), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_removed_keys_do_not_matter(backend: str) -> None:
    run = partial(prior_injection, backend=backend)
    (q, k, v), _ = case(batch=2, tokens=4, keys=5, heads=1, size=6).inputs()
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, False]])
    got = with_gradients(partial(run, mask=mask), NAMES, (q, k, v))
    few = run(q[:1], k[:1, :, [0, 2, 3]], v[:1, :, [0, 2, 3]])
    torch.testing.assert_close(got["y"][:1], few)
    torch.testing.assert_close(got["y"][1], v[1, 0, 2].expand(4, 6))  # one key: its value
    assert not got["dk"].transpose(1, 2)[~mask].any()
    assert not got["dv"].transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_sample_without_keys_gets_zeros(backend: str) -> None:
    args, _ = case(batch=2, tokens=4, keys=3, heads=1, size=8).inputs()
    mask = torch.tensor([[False] * 3, [True] * 3])
    results = with_gradients(partial(prior_injection, mask=mask, backend=backend), NAMES, args)
    for name, value in results.items():
        assert not value[0].any(), name
        assert value[1].any(), name


# 2. to 4. Layouts, empty batches, registration ------------------------------------------------------------------------


@needs_triton
@pytest.mark.usefixtures("poison")
def test_non_contiguous_inputs_give_the_same() -> None:
    (q, k, v), kwargs = case(batch=2, tokens=5, keys=3, heads=2, size=24, masked=True).inputs()
    assert not k.is_contiguous()
    dense = [t.contiguous() for t in (q, k, v)]
    expected = with_gradients(triton_op, NAMES, dense, kwargs)
    heads_last = dense[1].transpose(1, 3).contiguous().transpose(1, 3)
    mask = {"mask": kwargs["mask"].t().contiguous().t()}
    for (name, layout), keys in zip(layouts(q).items(), (k, heads_last, dense[1]), strict=True):
        actual = with_gradients(triton_op, NAMES, (layout, keys, v), mask)
        for key, value in actual.items():
            assert torch.equal(value, expected[key]), (name, key)
    same = k[:1].expand(2, -1, -1, -1)  # as prior_scope="batch" hands them over
    actual = with_gradients(triton_op, NAMES, (q, same, v))
    for key, value in with_gradients(triton_op, NAMES, (q, same.contiguous(), v)).items():
        assert torch.equal(actual[key], value), key


@needs_triton
def test_broadcast_gradient() -> None:
    args, _ = case(tokens=6, keys=3, heads=1, size=16).inputs()
    leaves = [a.clone().requires_grad_() for a in args]
    got = torch.autograd.grad(triton_op(*leaves).sum(), leaves)  # sum() hands back a dy of stride 0
    dense = torch.autograd.grad(triton_op(*leaves), leaves, torch.ones(1, 6, 16))
    for a, b in zip(got, dense, strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_nothing_outside_is_written() -> None:
    """The kernels get views in the middle of larger buffers; what lies around stays as it was."""
    from javis.kernels.ops.prior_injection import triton_impl

    (q, k, v), _ = case(batch=2, tokens=5, keys=3, heads=2, size=24).inputs()
    made, empty = [], torch.empty

    def guarded(shape: tuple[int, ...], **options: Any) -> Tensor:
        numel = torch.Size(shape).numel()
        made.append(torch.full((numel + 128,), 123.0, **options))
        return made[-1][64:-64].view(shape)

    torch.empty = guarded  # type: ignore[assignment]
    try:
        triton_impl.forward(q, k, v, None)
        triton_impl.backward(q, q, k, v, None)
    finally:
        torch.empty = empty
    assert len(made) == 3
    for buffer in made:
        assert (buffer[:64] == 123).all()
        assert (buffer[-64:] == 123).all()
        assert (buffer[64:-64] != 123).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_nothing_to_do(batch: int, tokens: int, backend: str) -> None:
    args, _ = case(batch=batch, tokens=tokens, keys=3, heads=2, size=8).inputs()
    results = with_gradients(partial(prior_injection, backend=backend), NAMES, args)
    assert results["y"].shape == results["dq"].shape == (batch, tokens, 16)
    assert torch.equal(results["dk"], torch.zeros(batch, 2, 3, 8))


@needs_triton
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(masked: bool, permuted: bool) -> None:
    (q, k, v), kwargs = case(batch=2, tokens=5, keys=3, heads=1, size=16, masked=masked).inputs()
    dy, mask = torch.randn_like(q), kwargs.get("mask")
    if permuted:
        q, dy = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, dy))
        k, v = (t.transpose(1, 3).contiguous().transpose(1, 3) for t in (k, v))
    tests = ("test_schema", "test_faketensor")  # gradients go through the autograd.Function, not through the op
    torch.library.opcheck(torch.ops.javis.prior_injection.default, (q, k, v, mask), test_utils=tests)
    torch.library.opcheck(torch.ops.javis.prior_injection_backward.default, (dy, q, k, v, mask), test_utils=tests)


# 5. torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference", "auto"])
def test_compiles_to_one_graph(backend: str, masked: bool) -> None:
    torch.compiler.reset()
    args, kwargs = case(batch=2, tokens=5, keys=3, heads=1, size=16, masked=masked).inputs()
    function = partial(prior_injection, backend=backend)
    # aot_eager traces forward and backward through the fakes like the default backend, without compiling C++ loops.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, NAMES, args, kwargs)
    for name, value in with_gradients(function, NAMES, args, kwargs).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")
    ran = ops_that_ran(lambda: with_gradients(compiled, NAMES, args, kwargs))
    assert ran == (BOTH if backend == "triton" else [])
    if backend == "sdpa":
        args[0][0, 1] = float("nan")
        assert compiled(*args, **kwargs)[0].isnan().any(-1).tolist() == [False, True, False, False, False]


# 6. and 7. The choice -------------------------------------------------------------------------------------------------


def attention_ops(function: Any) -> list[str]:
    return ops_that_ran(function, prefix="aten::scaled_dot_product_attention")


@needs_triton
def test_the_named_backend_is_the_one_that_runs() -> None:
    args, kwargs = case(tokens=3, keys=2, heads=1, size=8, masked=True).inputs()
    sdpa = ["aten::scaled_dot_product_attention"]
    assert ops_that_ran(lambda: with_gradients(triton_op, NAMES, args, kwargs)) == BOTH
    assert attention_ops(lambda: triton_op(*args)) == []
    for backend, attention in (("sdpa", sdpa), ("reference", []), ("auto", sdpa)):
        run = partial(prior_injection, backend=backend)
        assert ops_that_ran(lambda run=run: with_gradients(run, NAMES, args, kwargs)) == []
        assert attention_ops(lambda run=run: run(*args)) == attention
    with use_backend("triton"):
        assert ops_that_ran(lambda: prior_injection(*args, **kwargs)) == BOTH[:1]
        assert ops_that_ran(lambda: reference(*args, **kwargs)) == []  # the call's own word counts most


@pytest.mark.parametrize(
    ("backend", "shape", "why"),
    [
        ("triton", {"dtype": torch.float64}, "float64"),
        ("triton", {"keys": 129}, "at most 128 keys"),
        ("triton", {"size": 136}, "head size"),
        ("sdpa", {"dtype": torch.float64}, "float64"),
        ("cpu", {}, "this op has no such implementation"),
        ("cuda", {}, "this op has no such implementation"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, shape: dict[str, Any], why: str) -> None:
    args, _ = case(**({"tokens": 2, "heads": 1, "size": 8, "keys": 3} | shape)).inputs()
    with pytest.raises(UsageError, match=f"{why}|triton is not installed"):
        prior_injection(*args, backend=backend)
    if "no such implementation" not in why:  # a default that an op does not have leaves it at auto
        with use_backend(backend), pytest.raises(UsageError, match=f"{why}|triton is not installed"):
            prior_injection(*args)
    assert prior_injection(*args).dtype == args[0].dtype


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    args, _ = case(tokens=2, heads=1, size=8, keys=3).inputs()
    with pytest.raises(UsageError, match="CUDA device|not installed"):
        triton_op(*args)


# 8. The reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_reference_gradients(masked: bool) -> None:
    args, kwargs = case(torch.float64, batch=2, tokens=3, keys=3, heads=2, size=2, masked=masked).inputs()
    leaves = [t.detach().requires_grad_() for t in args]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, **kwargs), leaves)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_case_by_hand(backend: str) -> None:
    """D = 4, so the scale is 1/2. Keys of scores 0 and ln 3 for the first token: weights 1/4 and 3/4; equal for the
    second token, whose query is 0."""
    q = torch.tensor([[[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    k = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 0.0, 0.0, 0.0]]).log().nan_to_num(neginf=0.0)[None, None]
    v = torch.tensor([[4.0, 0.0, 8.0, 0.0], [0.0, 4.0, 8.0, -4.0]])[None, None]
    expected = torch.tensor([[[1.0, 3.0, 8.0, -3.0], [2.0, 2.0, 8.0, -2.0]]])
    torch.testing.assert_close(prior_injection(q, k, v, backend=backend), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_repeated_keys_are_the_unique_ones(backend: str) -> None:
    """What the official code does: the prior tokens once per frame. Equal copies change nothing."""
    (q, k, v), _ = case(tokens=4, keys=3, heads=2, size=8).inputs()
    repeated = prior_injection(q, k.repeat(1, 1, 5, 1), v.repeat(1, 1, 5, 1), backend=backend)
    torch.testing.assert_close(prior_injection(q, k, v, backend=backend), repeated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 8)}, "q must be"),
        ({"q": torch.zeros(2, 5, 8, dtype=torch.long)}, "q must be"),
        ({"k": torch.zeros(2, 2, 3, 5)}, "k must be .*H \\* D = 8"),
        ({"k": torch.zeros(1, 2, 3, 4)}, "k must be"),
        ({"k": torch.zeros(2, 2, 0, 4)}, "M > 0"),
        ({"v": torch.zeros(2, 2, 4, 4)}, "v must have the shape of k"),
        ({"v": torch.zeros(2, 2, 3, 4).half()}, "v must have the dtype of q"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(2, 3)}, "mask must be a bool"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_bad_arguments(change: dict[str, Any], message: str, backend: str) -> None:
    keys = torch.zeros(2, 2, 3, 4)
    arguments: dict[str, Any] = {"q": torch.zeros(2, 5, 8), "k": keys, "v": keys, "mask": None} | change
    with pytest.raises(ValueError, match=message):
        prior_injection(**arguments, backend=backend)


# 10. On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_offsets_beyond_2_to_31() -> None:
    """q of 2^31 + values: the last tokens are what they are alone."""
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs a GPU with 14 GiB free")
    tokens = 2**31 // 64 + 300
    q = torch.zeros(1, tokens, 64, dtype=torch.bfloat16, device="cuda")
    q[:, -4:] = torch.randn(4, 64, device="cuda")
    k, v = torch.randn(2, 1, 1, 8, 64, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(triton_op(q, k, v)[:, -4:], triton_op(q[:, -4:].clone(), k, v))
