"""Numbers of bidirectional_attention: tests 1, 8 and 10 of an op (CONTRIBUTING.md, "Adding an op").

The others are in test_bidirectional_attention_calls.py; test 9 is in test_contract.py.

Without a GPU the Triton kernels run in Triton's interpreter, at a tenth of a second per tile: shapes are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.kernels import bidirectional_attention, native
from javis.kernels.ops.bidirectional_attention import native_impl
from javis.kernels.ops.bidirectional_attention.cases import BidirectionalAttentionCase
from javis.kernels.testing import assert_within_budget
from javis.kernels.triton_support import HAS_TRITON
from javis.model.ops import ModelOps
from tests.kernels.calls import run_on_isa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
CPU, TRITON = pytest.param("cpu", marks=needs_native), pytest.param("triton", marks=needs_triton)
fused = pytest.mark.parametrize("backend", [CPU, TRITON])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
reference = partial(bidirectional_attention, backend="reference")
Results = dict[str, Tensor]

# Few tokens, sizes that divide no tile, head sizes below, between and at powers of two, several tiles either way.
SHAPES = [
    {"batch": 1, "video": 2, "audio": 3, "heads": 1, "size": 3},
    {"batch": 2, "video": 35, "audio": 2, "heads": 1, "size": 16},
    {"batch": 1, "video": 2, "audio": 37, "heads": 3, "size": 5},
    {"batch": 1, "video": 40, "audio": 36, "heads": 2, "size": 72},
]
LONGER = [
    {"batch": 1, "video": 150, "audio": 70, "heads": 1, "size": 24},
    {"batch": 2, "video": 600, "audio": 50, "heads": 2, "size": 72},
]


def case(dtype: torch.dtype = torch.float32, **shape: Any) -> BidirectionalAttentionCase:
    return BidirectionalAttentionCase(name="test", dtype=dtype, **shape)


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu", **shape: Any) -> tuple[Any, ...]:
    return case(dtype, **shape).inputs(seed=seed, device=device)[0]


def with_gradients(function: Callable[..., Any], args: tuple[Any, ...], dtype: torch.dtype | None = None) -> Results:
    """Both results and the gradients of all four inputs, for fixed gradients of the results."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in args[:4]]
    results = function(*leaves, args[4])
    generator = torch.Generator().manual_seed(7)
    dy = [torch.randn(y.shape, generator=generator).to(y.device, args[0].dtype).to(y.dtype) for y in results]
    gradients = torch.autograd.grad(results, leaves, dy)
    names = ("to_video", "to_audio", "dq_video", "dq_audio", "dv_video", "dv_audio")
    return {name: value.detach() for name, value in zip(names, (*results, *gradients), strict=True)}


def check_budget(function: Callable[..., Any], args: tuple[Any, ...], plain: Callable[..., Any] = reference) -> None:
    exact, same_dtype = with_gradients(reference, args, torch.float64), with_gradients(plain, args)
    for name, value in with_gradients(function, args).items():
        assert_within_budget(name, value, exact[name], same_dtype[name])


# 1. Budget --------------------------------------------------------------------------------------------------------


@fused
@every_dtype
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_forward_and_gradients_are_within_budget(shape: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    check_budget(partial(bidirectional_attention, backend=backend), tensors(dtype, seed=1, **shape))


@needs_native
@every_dtype
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", LONGER, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_longer_streams_on_cpu(shape: dict[str, Any], dtype: torch.dtype) -> None:
    check_budget(partial(bidirectional_attention, backend="cpu"), tensors(dtype, seed=1, **shape))


@needs_native
@every_dtype
@pytest.mark.usefixtures("poison")
def test_chunks_of_video_on_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, the last one shorter: columns are carried over, and rescaled when their maximum rises."""
    monkeypatch.setattr(native_impl, "ROWS", 7)
    args = tensors(dtype, seed=1, batch=2, video=40, audio=9, heads=2, size=24)
    rising = args[0] * torch.linspace(0.1, 4, 40)[:, None].to(dtype)
    check_budget(partial(bidirectional_attention, backend="cpu"), (rising, *args[1:]))


@needs_native
def test_the_maximum_of_an_earlier_chunk_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first video token scores 1000 with every audio token, the others 0; relative to those exp overflows."""
    monkeypatch.setattr(native_impl, "ROWS", 7)
    q_video, q_audio, v_video, v_audio, _ = tensors(batch=1, video=40, audio=5, heads=1, size=16)
    q_video, q_audio = torch.zeros_like(q_video), torch.ones_like(q_audio)
    q_video[0, 0] = 250.0  # * 16 / 4
    to_video, to_audio = bidirectional_attention(q_video, q_audio, v_video, v_audio, 1, backend="cpu")
    torch.testing.assert_close(to_video[0], v_audio[0].mean(0).expand(40, 16))
    torch.testing.assert_close(to_audio[0], v_video[0, :1].expand(5, 16))


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("programs", [1, 2, 512])
def test_splits_of_video_on_triton(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one program that carries its columns through all tiles to one program per tile."""
    from javis.kernels.ops.bidirectional_attention import launch

    monkeypatch.setattr(launch, "PROGRAMS", programs)
    args = tensors(torch.bfloat16, seed=1, batch=1, video=260, audio=20, heads=1, size=16)
    rising = args[0] * torch.linspace(0.1, 4, 260)[:, None].bfloat16()
    check_budget(partial(bidirectional_attention, backend="triton"), (rising, *args[1:]))


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_is_within_budget(isa: str) -> None:
    """Runs the copies of the loops that this machine would not choose, in a process of their own."""
    run_on_isa(
        isa,
        "import tests.kernels.test_bidirectional_attention as t\n"
        "for dtype in (t.torch.float32, t.torch.bfloat16):\n"
        "    for shape in t.SHAPES + t.LONGER: t.test_longer_streams_on_cpu(shape, dtype)\n"
        "t.test_no_score_is_too_large('cpu')\n",
    )


@fused
@every_dtype
def test_agrees_with_the_default_op_of_the_model(dtype: torch.dtype, backend: str) -> None:
    """Whose scores and probabilities are rounded to the dtype of the inputs."""
    args = tensors(dtype, batch=1, video=40, audio=20, heads=1, size=32)
    check_budget(partial(bidirectional_attention, backend=backend), args, ModelOps().bidirectional_attention)


@fused
@every_dtype
@pytest.mark.parametrize(("video", "audio"), [(1, 1), (1, 5), (5, 1)])
def test_one_token(video: int, audio: int, dtype: torch.dtype, backend: str) -> None:
    """A softmax over one token has no gradient, which a kernel finds as a difference of two equal sums."""
    args = tensors(dtype, batch=1, video=video, audio=audio, heads=1, size=16)
    exact = with_gradients(reference, args, torch.float64)
    for name, value in with_gradients(partial(bidirectional_attention, backend=backend), args).items():
        size = 16 * exact[name].abs().amax().clamp(min=1)  # as long as the sums are
        assert (value.double() - exact[name]).abs().amax() <= size * torch.finfo(dtype).eps, name


@fused
def test_no_score_is_too_large(backend: str) -> None:
    """Scores of +-10^4, where exp overflows, and a softmax is the value of its largest score; then the other way."""
    q_video, q_audio, v_video, v_audio, _ = tensors(batch=1, video=40, audio=5, heads=1, size=16)
    direction = torch.zeros(16)
    direction[0] = 4.0  # scores are q_video[0] * q_audio[0] * 16 / 4
    q_video, q_audio = (
        q_video.sign() * direction,
        direction * torch.tensor([1, -1, 500.0, 625.0, -625.0])[None, :, None],
    )
    to_video, to_audio = bidirectional_attention(q_video, q_audio, v_video, v_audio, 1, backend=backend)
    up = q_video[0, :, :1] > 0
    torch.testing.assert_close(to_video[0], torch.where(up, v_audio[0, 3], v_audio[0, 4]), rtol=0, atol=1e-6)
    for audio, agrees in ((2, True), (3, True), (4, False)):
        chosen = v_video[0][up[:, 0] == agrees]
        torch.testing.assert_close(to_audio[0, audio], chosen.mean(0), rtol=0, atol=1e-6)
    gradients = with_gradients(
        partial(bidirectional_attention, backend=backend), (q_video, q_audio, v_video, v_audio, 1)
    )
    assert all(value.isfinite().all() for value in gradients.values())


@fused
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy notices what is tested
def test_nan_and_minus_infinity_go_where_they_belong(backend: str) -> None:
    q_video, q_audio, v_video, v_audio, _ = tensors(batch=1, video=40, audio=5, heads=1, size=16)
    run = partial(bidirectional_attention, num_heads=1, backend=backend)
    broken = q_video.clone()
    broken[0, 33, 2] = math.nan
    to_video, to_audio = run(broken, q_audio, v_video, v_audio)
    assert to_video.isnan().all(-1).nonzero().tolist() == [[0, 33]]  # its own row, and every column has it in its sum
    assert to_video[0, :33].isfinite().all()
    assert to_audio.isnan().all()
    broken = v_video.clone()
    broken[0, 33, 2] = math.nan
    to_video, to_audio = run(q_video, q_audio, broken, v_audio)
    assert to_video.isfinite().all()
    assert to_audio.isnan().any(1).nonzero().tolist() == [[0, 2]]
    # Scores of -inf against one audio token: it has no weight for anybody, and its own softmax is over nothing.
    positive, away = q_video.abs(), q_audio.clone()
    away[0, 1] = -math.inf
    to_video, to_audio = run(positive, away, v_video, v_audio)
    rest = [0, 2, 3, 4]
    expected = reference(positive, q_audio[:, rest], v_video, v_audio[:, rest], 1)
    torch.testing.assert_close(to_video, expected[0])
    torch.testing.assert_close(to_audio[:, rest], expected[1])
    assert to_audio[0, 1].isnan().all()
    # And against the first 36 video tokens, which is more than a tile: the others share the columns.
    away = positive.clone()
    away[0, :36] = -math.inf
    to_video, to_audio = run(away, q_audio.abs(), v_video, v_audio)
    expected = reference(positive[:, 36:], q_audio.abs(), v_video[:, 36:], v_audio, 1)
    assert to_video[0, :36].isnan().all()
    torch.testing.assert_close(to_video[:, 36:], expected[0])
    torch.testing.assert_close(to_audio, expected[1])


@needs_native
def test_every_nan_stays_nan_on_cpu() -> None:
    """2^x adds low bits of x to an exponent: a NaN that has some set must not come out as a number."""
    scores = torch.zeros(1, 2, 20)
    scores[0, 0, 3:4] = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    rows, columns, row_lse = torch.zeros_like(scores), torch.zeros_like(scores), torch.zeros(1, 2)
    maximum, total, keep = torch.full((1, 20), -math.inf), torch.zeros(1, 20), torch.zeros(1, 20)
    torch.ops.javis_native.bidirectional_softmaxes(scores, rows, columns, row_lse, maximum, total, keep, 0.5)
    assert rows[0, 0].isnan().all() and rows[0, 1].isfinite().all()
    assert total[0].isnan().tolist() == [j == 3 for j in range(20)]


@needs_native
def test_result_does_not_depend_on_threads() -> None:
    args = tensors(batch=2, video=600, audio=50, heads=3, size=24)
    before, results = torch.get_num_threads(), []
    softmaxes = torch.ops.javis_native.bidirectional_softmaxes
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            # The products are PyTorch's, so only what is ours is compared bit by bit.
            scores = torch.randn(6, 100, 50, generator=torch.Generator().manual_seed(0))
            state = [
                torch.zeros_like(scores),
                torch.zeros_like(scores),
                torch.zeros(6, 100),
                torch.full((6, 50), -math.inf),
            ]
            state += [torch.zeros(6, 50), torch.zeros(6, 50)]
            softmaxes(scores, *state, 0.5)
            results.append(state)
            check_budget(partial(bidirectional_attention, backend="cpu"), args)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# 8. The reference --------------------------------------------------------------------------------------------------


def test_reference_gradients() -> None:
    *inputs, heads = tensors(torch.float64, batch=2, video=4, audio=3, heads=2, size=3)
    assert torch.autograd.gradcheck(lambda *x: reference(*x, heads), [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("backend", ["reference", "sdpa", CPU, TRITON])
def test_case_by_hand(backend: str) -> None:
    """D = 4, so scores are halved: 2 ln 2 and 2 ln 3 make weights of 2 and 3, and 0 makes weights of 1."""
    rows, columns = [0.0, 2 * math.log(2)], [1.0, 0.0, math.log(3) / math.log(2)]
    q_video, q_audio = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)
    q_video[0, :, 0], q_audio[0, :, 0] = torch.tensor(rows), torch.tensor(columns)
    # exp(scores): video 0: 1, 1, 1; video 1: 2, 1, 3.
    v_video, v_audio = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)
    v_video[0, :, 0], v_audio[0, :, 1] = torch.tensor([0.0, 12.0]), torch.tensor([6.0, 12.0, 18.0])
    to_video, to_audio = bidirectional_attention(q_video, q_audio, v_video, v_audio, 1, backend=backend)
    torch.testing.assert_close(to_video[0, :, 1], torch.tensor([12.0, (12 + 12 + 54) / 6]), rtol=0, atol=1e-5)
    torch.testing.assert_close(to_audio[0, :, 0], torch.tensor([8.0, 6.0, 9.0]), rtol=0, atol=1e-5)
    assert not to_video[0, :, [0, 2, 3]].any()


# 10. Large offsets -------------------------------------------------------------------------------------------------


@needs_triton
def test_offsets_beyond_32_bits() -> None:
    """Samples 2^30 values apart, of which memory for only the touched pages is ever used."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free GPU memory")
    far = torch.empty(2**31 + 2**16, dtype=torch.bfloat16, device=DEVICE)
    *inputs, heads = tensors(torch.bfloat16, device=DEVICE, batch=3, video=5, audio=4, heads=1, size=16)
    views = []
    for i, x in enumerate(inputs):
        view = far[i * 4096 :].as_strided(x.shape, (2**30, 16, 1))
        views.append(view.copy_(x))
    expected = with_gradients(partial(bidirectional_attention, backend="triton"), (*inputs, heads))
    for name, value in with_gradients(partial(far_apart, views), (*inputs, heads)).items():
        assert torch.equal(value, expected[name]), name


def far_apart(views: list[Tensor], *args: Any) -> Any:
    """The op on the views, with gradients that reach the arguments; detaching keeps strides, as leaves do."""

    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, view: Tensor) -> Tensor:
            return view.view_as(view)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
            return dy, None

    return bidirectional_attention(
        *(Moved.apply(x, v) for x, v in zip(args[:4], views, strict=True)), args[4], backend="triton"
    )
