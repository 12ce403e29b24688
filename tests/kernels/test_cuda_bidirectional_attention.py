"""The CUDA kernels of bidirectional_attention: in the emulator everywhere, and on a GPU where there is one.

Tests with ``cuda_device`` call the public function; on a CPU the emulator then runs the same sources with the same C++
bindings (docs/cuda.md). What all backends share is tested with the others. Test numbers: CONTRIBUTING.md.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import triton_support
from javis.kernels.ops.bidirectional_attention import contract
from javis.kernels.ops.bidirectional_attention.api import bidirectional_attention
from javis.kernels.ops.bidirectional_attention.cases import BidirectionalAttentionCase
from javis.kernels.testing import assert_within_budget
from tests.kernels.borders import guarded
from tests.kernels.calls import ops_that_ran
from tests.kernels.emulation import CUDA, emulate, needs_emulator

TILE = 64  # video tokens; kBidirectionalTile in csrc/cuda/bidirectional_attention.h
# One token; less than a tile and a tile and a bit of video; one warp, three warps of audio; heads of 72 are compiled as
# such, 8 and 32 run in what is compiled for 64, 128 and 80 in what is compiled for 128.
SHAPES: list[dict[str, Any]] = [
    {"batch": 1, "video": 1, "audio": 1, "heads": 1, "size": 72},
    {"batch": 2, "video": 35, "audio": 2, "heads": 2, "size": 8},
    {"batch": 1, "video": 70, "audio": 37, "heads": 2, "size": 72},
    {"batch": 1, "video": 2, "audio": 17, "heads": 3, "size": 32},
    {"batch": 1, "video": 64, "audio": 16, "heads": 1, "size": 128},
]
# More audio than a block has warps for: rows are left in memory between two passes, and three.
LONG: list[dict[str, Any]] = [
    {"batch": 1, "video": 70, "audio": 230, "heads": 1, "size": 72},
    {"batch": 1, "video": 3, "audio": 227, "heads": 2, "size": 64},
    {"batch": 1, "video": 66, "audio": 270, "heads": 1, "size": 80},
]
needs_triton = pytest.mark.skipif(not triton_support.HAS_TRITON, reason="triton is not installed")
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
on_cuda = partial(bidirectional_attention, backend="cuda")
reference = partial(bidirectional_attention, backend="reference")


def tensors(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 1, **shape: Any) -> tuple[Any, ...]:
    args: tuple[Any, ...] = BidirectionalAttentionCase(name="test", dtype=dtype, **shape).inputs(
        seed=seed, device=device
    )[0]
    return args


def check_budget(actual: tuple[Tensor, Tensor], args: tuple[Any, ...]) -> None:
    """Against the reference, which rounds nothing on the way."""
    inputs, heads = [x.cpu() for x in args[:4]], args[4]
    exact, same_dtype = reference(*(x.double() for x in inputs), heads), reference(*inputs, heads)
    for name, value, e, s in zip(("to_video", "to_audio"), actual, exact, same_dtype, strict=True):
        assert_within_budget(name, value.cpu(), e, s)


def emulated(args: tuple[Any, ...], *, splits: int = 1, order: int = 0) -> tuple[Tensor, Tensor]:
    """The kernels past PyTorch: the caller says how often the video is split and in which order threads run.

    Every access of 4 bytes and more is held to the tensors of the call.
    """
    q_video, q_audio, _, _, heads = args
    batch, n_video, width = q_video.shape
    n_audio, size, pairs = q_audio.shape[1], width // heads, batch * heads
    tiles = -(-n_video // TILE)
    per_split = -(-tiles // splits)
    splits = -(-tiles // per_split)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype)

    results = empty(*q_video.shape, dtype=q_video.dtype), empty(*q_audio.shape, dtype=q_video.dtype)
    lse = empty(batch, heads, n_video), empty(batch, heads, n_audio)
    parts = empty(pairs, splits, n_audio, size), empty(pairs, splits, n_audio), empty(pairs, splits, n_audio)
    rows = empty(pairs, n_video, size), empty(pairs, 3 if size <= 72 else 2, n_video, 2)
    kernel = emulate(CUDA / "bidirectional_attention.cu")
    kernel.order(order)
    strides = [x.stride(i) for x in args[:4] for i in (0, 1)]
    kernel(
        "javis_cuda_bidirectional_attention", *args[:4], *results, *lse, *parts, *rows, *strides,
        batch, heads, size, n_video, n_audio, per_split, splits, int(q_video.dtype == torch.bfloat16),
    )  # fmt: skip
    kernel.order(0)
    return results


def rising(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Scores grow along the video: every tile has a larger maximum than those before."""
    q_video = args[0]
    return (q_video * torch.linspace(0.1, 4, q_video.shape[1])[:, None].to(q_video), *args[1:])


# 1. Budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@each_dtype
@pytest.mark.parametrize("shape", [*SHAPES, LONG[0]], ids=lambda s: "x".join(map(str, s.values())))
def test_within_budget(shape: dict[str, Any], dtype: torch.dtype, cuda_device: str) -> None:
    args = tensors(cuda_device, dtype, **shape)
    check_budget(on_cuda(*args), args)


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", LONG[1:], ids=lambda s: "x".join(map(str, s.values())))
def test_several_passes_over_the_audio(shape: dict[str, Any], cuda_device: str) -> None:
    args = tensors(cuda_device, **shape)
    args = (args[0], args[1] * torch.linspace(0.1, 4, shape["audio"])[:, None].to(args[1]), *args[2:])
    check_budget(on_cuda(*args), args)


@needs_emulator
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_emulated_splits_of_video(splits: int) -> None:
    """From one block of threads that passes over all tiles to one for each."""
    args = rising(tensors(batch=1, video=140, audio=20, heads=1, size=24))
    check_budget(emulated(args, splits=splits), args)


@needs_emulator
@pytest.mark.parametrize(
    "shape", [{"video": 135, "audio": 40, "size": 72}, {"video": 66, "audio": 135, "size": 80}], ids=["72", "80"]
)
def test_emulated_threads_in_any_order_give_the_same_bits(shape: dict[str, int]) -> None:
    args = rising(tensors(batch=1, heads=1, **shape))
    results = [emulated(args, order=seed) for seed in (0, 1, 2)]
    check_budget(results[0], args)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_score_is_too_large(cuda_device: str) -> None:
    """Scores of +-10^4, where exp overflows, and a softmax is the value of its largest score; then the other way."""
    q_video, q_audio, v_video, v_audio, _ = tensors(batch=1, video=70, audio=5, heads=1, size=16)
    direction = torch.zeros(16).bfloat16()
    direction[0] = 4.0  # scores are q_video[0] * q_audio[0] * 16 / 4
    q_video = q_video.sign() * direction
    q_audio = direction * torch.tensor([1, -1, 500.0, 625.0, -625.0]).bfloat16()[None, :, None]
    args = [x.to(cuda_device) for x in (q_video, q_audio, v_video, v_audio)]
    to_video, to_audio = (y.cpu() for y in on_cuda(*args, 1))
    up = q_video[0, :, :1] > 0
    assert torch.equal(to_video[0], torch.where(up, v_audio[0, 3], v_audio[0, 4]))
    for audio, agrees in ((2, True), (3, True), (4, False)):
        chosen = v_video[0][up[:, 0] == agrees].float()
        torch.testing.assert_close(to_audio[0, audio].float(), chosen.mean(0), rtol=2**-8, atol=1e-6)


def test_nan_and_minus_infinity_go_where_they_belong(cuda_device: str) -> None:
    q_video, q_audio, v_video, v_audio, _ = tensors(cuda_device, batch=1, video=70, audio=20, heads=1, size=16)
    broken = q_video.clone()
    broken[0, 66, 2] = math.nan
    to_video, to_audio = on_cuda(broken, q_audio, v_video, v_audio, 1)
    assert to_video.isnan().all(-1).nonzero().tolist() == [[0, 66]]  # its own row, and every column has it in its sum
    assert to_video[0, :66].isfinite().all() and to_audio.isnan().all()
    broken = v_video.clone()
    broken[0, 66, 2] = math.nan
    to_video, to_audio = on_cuda(q_video, q_audio, broken, v_audio, 1)
    assert to_video.isfinite().all()
    assert to_audio.isnan().any(1).nonzero().tolist() == [[0, 2]]
    # Scores of -inf against one audio token: it has no weight for anybody, and its own softmax is over nothing.
    positive, away = q_video.abs(), q_audio.clone()
    away[0, 1] = -math.inf
    to_video, to_audio = on_cuda(positive, away, v_video, v_audio, 1)
    rest = [0, *range(2, 20)]
    expected = on_cuda(positive, q_audio[:, rest], v_video, v_audio[:, rest], 1)
    torch.testing.assert_close(to_video, expected[0])
    torch.testing.assert_close(to_audio[:, rest], expected[1])
    assert to_audio[0, 1].isnan().all()
    # And against the first 66 video tokens, which is more than a tile: the others share the columns.
    away = positive.clone()
    away[0, :66] = -math.inf
    to_video, to_audio = on_cuda(away, q_audio.abs(), v_video, v_audio, 1)
    expected = on_cuda(positive[:, 66:], q_audio.abs(), v_video[:, 66:], v_audio, 1)
    assert to_video[0, :66].isnan().all()
    torch.testing.assert_close(to_video[:, 66:], expected[0])
    torch.testing.assert_close(to_audio, expected[1])


def test_case_by_hand(cuda_device: str) -> None:
    """D = 16, so scores are divided by 4: 4 ln 2 and 4 ln 3 make weights of 2 and 3, and 0 makes weights of 1."""
    options: dict[str, Any] = {"dtype": torch.float16, "device": cuda_device}
    q_video, v_video = torch.zeros(1, 2, 16, **options), torch.zeros(1, 2, 16, **options)
    q_audio, v_audio = torch.zeros(1, 3, 16, **options), torch.zeros(1, 3, 16, **options)
    q_video[0, 1, 0] = 4 * math.log(2)
    q_audio[0, :, 0] = torch.tensor([1.0, 0.0, math.log(3) / math.log(2)])
    # exp(scores): video 0: 1, 1, 1; video 1: 2, 1, 3.
    v_video[0, 1, 0], v_audio[0, :, 1] = 12.0, torch.tensor([6.0, 12.0, 18.0]).to(v_audio)
    to_video, to_audio = (y.float().cpu() for y in on_cuda(q_video, q_audio, v_video, v_audio, 1))
    torch.testing.assert_close(to_video[0, :, 1], torch.tensor([12.0, (12 + 12 + 54) / 6]), rtol=2e-3, atol=0)
    torch.testing.assert_close(to_audio[0, :, 0], torch.tensor([8.0, 6.0, 9.0]), rtol=2e-3, atol=0)
    assert not to_video[0, :, [0, 2, 3]].any()


# 2. to 4. Layouts, empty batches, what the op promises ----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["columns of a wider tensor", "unaligned", "tokens first", "channels first"])
def test_layouts(layout: str, cuda_device: str) -> None:
    *inputs, heads = tensors(cuda_device, batch=2, video=5, audio=19, heads=2, size=24)
    expected = on_cuda(*inputs, heads)

    def arranged(x: Tensor) -> Tensor:
        if layout == "tokens first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "channels first":
            return x.mT.contiguous().mT
        wide = torch.full((2, x.shape[1] + 1, 80), math.nan, dtype=x.dtype, device=x.device)
        start = 8 if layout == "columns of a wider tensor" else 3
        wide[:, :-1, start : start + 48] = x
        return wide[:, :-1, start : start + 48]

    for result, wanted in zip(on_cuda(*map(arranged, inputs), heads), expected, strict=True):
        assert torch.equal(result, wanted) and result.is_contiguous()


@pytest.mark.parametrize(("batch", "video", "audio"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_to_do(batch: int, video: int, audio: int, cuda_device: str) -> None:
    args = tensors(cuda_device, batch=batch, video=video, audio=audio, heads=1, size=8)
    to_video, to_audio = on_cuda(*args)
    assert to_video.shape == (batch, video, 8) and to_audio.shape == (batch, audio, 8)
    assert not to_video.any() and not to_audio.any()


def register_fake() -> None:
    if not hasattr(register_fake, "done"):
        torch.library.register_fake("javis_emulated::bidirectional_attention")(contract._forward_shapes)
        register_fake.done = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted: bool, cuda_device: str) -> None:
    if cuda_device == "cpu":
        register_fake()
    *inputs, heads = tensors(cuda_device, batch=2, video=3, audio=5, heads=2, size=8)
    if permuted:
        inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    op = torch.ops.javis_cuda.bidirectional_attention.default
    torch.library.opcheck(op, (*inputs, heads), test_utils=("test_schema", "test_faketensor"))


def test_the_op_refuses_what_the_api_never_sends(cuda_device: str) -> None:
    op = torch.ops.javis_cuda.bidirectional_attention
    video = torch.zeros(1, 3, 16, dtype=torch.bfloat16, device=cuda_device)
    for arguments, message in (
        ((video.float(),) * 4 + (1,), "must be bfloat16 or float16"),
        ((video, video, video, video[:, :2], 1), "v_audio has size 2"),
        ((video, video.half(), video, video, 1), "q_audio has the wrong dtype"),
        ((video, video, video, video, 3), "must be a multiple of 8"),
        ((video, video, video, video, 4), "must be a multiple of 8"),
        ((video, video, video, video, 0), "must be a multiple of 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_nothing_is_written_outside(cuda_device: str) -> None:
    if cuda_device == "cuda":
        pytest.skip("watches allocations of a CPU; on a GPU compute-sanitizer does this")
    for shape in (SHAPES[1], SHAPES[2], LONG[1]):
        args = tensors(**shape)
        with guarded() as borders:
            results = on_cuda(*args)
        assert not borders.touched()
        assert all(borders.holds(y) and y.isfinite().all() for y in results)


# 5. to 7. torch.compile and the choice -------------------------------------------------------------------------------


def test_compiles_to_one_graph(cuda_device: str) -> None:
    if cuda_device == "cpu":
        register_fake()
    torch.compiler.reset()
    args = tensors(cuda_device, batch=1, video=3, audio=5, heads=2, size=8)
    compiled = torch.compile(on_cuda, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), on_cuda(*args), strict=True))


def test_the_named_backend_is_the_one_that_runs(cuda_device: str) -> None:
    args = tensors(cuda_device, batch=1, video=3, audio=5, heads=2, size=8)
    namespace = "javis_emulated" if cuda_device == "cpu" else "javis_cuda"
    for function in (on_cuda, bidirectional_attention):  # auto takes it too
        assert ops_that_ran(partial(function, *args)) == [f"{namespace}::bidirectional_attention"]


@pytest.mark.parametrize(
    ("dtype", "batch", "size", "why"),
    [
        (torch.float32, 1, 8, "no float32 kernel, only bfloat16, float16"),
        (torch.bfloat16, 1, 12, "head size 12 is not a multiple of 8 up to 128"),
        (torch.bfloat16, 1, 136, "head size 136 is not a multiple of 8 up to 128"),
        (torch.bfloat16, 65536, 8, "65536, a launch grid holds up to 65535"),
    ],
)
def test_a_call_that_cannot_run_says_why(dtype: torch.dtype, batch: int, size: int, why: str, cuda_device: str) -> None:
    x = torch.zeros(1, 1, size, dtype=dtype, device=cuda_device).expand(batch, 1, size)
    with pytest.raises(UsageError, match=why):
        on_cuda(x, x, x, x, 1)


@needs_triton
@pytest.mark.parametrize("shape", [{"video": 35, "audio": 20}, {"video": 3, "audio": 230}], ids=["one pass", "two"])
def test_gradients_by_triton_are_within_budget(shape: dict[str, int], cuda_device: str) -> None:
    """They are made from the logarithms of the denominators that the CUDA kernels return."""
    *inputs, heads = tensors(cuda_device, batch=1, heads=1, size=16, **shape)
    generator = torch.Generator().manual_seed(7)
    dy = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in inputs[:2]]

    def gradients(function: Any, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves, heads), leaves, [g.to(device, dtype) for g in dy])

    exact, same_dtype = (gradients(reference, "cpu", dtype) for dtype in (torch.float64, torch.bfloat16))
    found = gradients(on_cuda, cuda_device, torch.bfloat16)
    for name, value, e, s in zip(
        ("dq_video", "dq_audio", "dv_video", "dv_audio"), found, exact, same_dtype, strict=True
    ):
        assert_within_budget(name, value.cpu(), e, s)


def test_logarithms_of_the_denominators(cuda_device: str) -> None:
    *inputs, heads = tensors(cuda_device, batch=2, video=70, audio=20, heads=2, size=16)
    *_, lse_video, lse_audio = torch.ops.javis_cuda.bidirectional_attention(*inputs, heads)
    q_video, q_audio = (x.double().unflatten(-1, (heads, -1)) for x in inputs[:2])
    scores = torch.einsum("bihd,bjhd->bhij", q_video, q_audio) / 4
    for found, expected in ((lse_video, scores.logsumexp(-1)), (lse_audio, scores.logsumexp(-2))):
        torch.testing.assert_close(found.double(), expected / math.log(2), rtol=0, atol=2e-3)  # rounded summands


def test_without_triton_a_gradient_is_left_to_others(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "HAS_TRITON", False)
    *inputs, heads = tensors(cuda_device, batch=1, video=3, audio=5, heads=2, size=8)
    inputs[3].requires_grad_()
    with pytest.raises(UsageError, match="requires a gradient, whose kernels are Triton's: triton is not installed"):
        on_cuda(*inputs, heads)
    with torch.no_grad():
        assert all(y.isfinite().all() for y in on_cuda(*inputs, heads))
    assert bidirectional_attention(*inputs, heads)[0].requires_grad


def test_cuda_on_a_cpu_tensor_says_why() -> None:
    args = tensors(batch=1, video=3, audio=5, heads=2, size=8)
    with pytest.raises(UsageError, match="'cuda' cannot run this call: needs CUDA tensors, got one on cpu"):
        on_cuda(*args)


# 10. Offsets ----------------------------------------------------------------------------------------------------------


def test_offsets_beyond_two_to_the_31(cuda_device: str) -> None:
    """Samples 2^31 values apart, tokens 2^29: on a CPU memory that is never touched costs nothing."""
    if cuda_device == "cuda" and torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of GPU memory")
    *inputs, heads = tensors(cuda_device, batch=2, video=3, audio=3, heads=1, size=8)
    far = torch.empty(2**31 + 2**31 + 2**12, dtype=inputs[0].dtype, device=cuda_device)
    views = [far[i * 64 :].as_strided(x.shape, (2**31, 2**29, 1)).copy_(x) for i, x in enumerate(inputs)]
    for result, expected in zip(on_cuda(*views, heads), on_cuda(*inputs, heads), strict=True):
        assert torch.equal(result, expected)
