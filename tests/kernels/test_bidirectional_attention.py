"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for bidirectional_attention. Test 9 is in test_contract.py.

Without a GPU the Triton kernels run in Triton's interpreter, at a tenth of a second per tile: shapes are small.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import bidirectional_attention, native, use_backend
from javis.kernels.ops.bidirectional_attention import contract, native_impl
from javis.kernels.ops.bidirectional_attention.cases import BidirectionalAttentionCase
from javis.kernels.testing import assert_within_budget
from javis.kernels.triton_support import HAS_TRITON
from javis.model.ops import ModelOps

ROOT = Path(__file__).resolve().parents[2]
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


def ops_that_ran(function: Callable[[], object]) -> list[str]:
    """Names of javis' ops and of PyTorch's attention that PyTorch's profiler saw, in compiled code too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    keys = [event.key for event in profile.key_averages()]
    return sorted(key for key in keys if key.startswith("javis::") or key == "aten::scaled_dot_product_attention")


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
    if isa not in native.build_info().get("instruction_sets", "").split():
        pytest.skip(f"not built for {isa}")
    code = (
        "import sys; from javis.kernels import native\n"
        f"if native.cpu_isa() != {isa!r}: print('not here:', native.cpu_isa()); sys.exit(77)\n"
        "import tests.kernels.test_bidirectional_attention as t\n"
        "for dtype in (t.torch.float32, t.torch.bfloat16):\n"
        "    for shape in t.SHAPES + t.LONGER: t.test_longer_streams_on_cpu(shape, dtype)\n"
        "t.test_no_score_is_too_large('cpu')\n"
    )
    environment = os.environ | {"JAVIS_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip(f"this processor has no {isa}: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr[-2000:]


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
def test_result_does_not_depend_on_threads() -> None:
    args = tensors(batch=2, video=600, audio=50, heads=3, size=24)
    before, results = torch.get_num_threads(), []
    softmaxes = torch.ops.javis_native.bidirectional_softmaxes
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            # The products are PyTorch's, so only what is ours is compared bit by bit.
            scores = torch.randn(6, 100, 50, generator=torch.Generator().manual_seed(0))
            state = [torch.zeros_like(scores), torch.zeros(6, 100), torch.full((6, 50), -math.inf)]
            state += [torch.zeros(6, 50), torch.zeros(6, 50)]
            softmaxes(scores, *state, 0.5)
            results.append([scores, *state])
            check_budget(partial(bidirectional_attention, backend="cpu"), args)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# 2. to 4. Layouts, empty batches, registration ---------------------------------------------------------------------


@fused
@pytest.mark.usefixtures("poison")
def test_non_contiguous_inputs_give_the_same(backend: str) -> None:
    run = partial(bidirectional_attention, backend=backend)
    *inputs, heads = tensors(batch=2, video=9, audio=5, heads=1, size=16)
    expected = with_gradients(run, (*inputs, heads))

    def columns(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:2], 60), math.nan)
        wide[:, :, 12:28] = x
        return wide[:, :, 12:28]

    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "columns of a wider tensor": columns,
        "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    }
    for name, layout in layouts.items():
        views = [layout(x) for x in inputs]
        assert not any(x.is_contiguous() for x in views), name
        for key, value in with_gradients(run, (*views, heads)).items():
            torch.testing.assert_close(value, expected[key], msg=lambda m, name=name, key=key: f"{name}, {key}: {m}")
    # Gradients of a sum have stride 0.
    leaves = [x.requires_grad_() for x in inputs]
    got = torch.autograd.grad([y.sum() for y in run(*leaves, heads)], leaves)
    dense = torch.autograd.grad(run(*leaves, heads), leaves, [torch.ones(2, 9, 16), torch.ones(2, 5, 16)])
    for a, b in zip(got, dense, strict=True):
        torch.testing.assert_close(a, b)


@needs_triton
def test_nothing_is_written_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the launches allocate lies between sentinels, which must survive."""
    from javis.kernels.ops.bidirectional_attention import launch

    allocated: list[Tensor] = []
    make = torch.empty

    def guarded(shape: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        if isinstance(shape, int):  # the interpreter's own
            return make(shape, dtype=dtype, device=device)
        whole = make(math.prod(shape) + 512, dtype=dtype, device=device).fill_(7)
        allocated.append(whole)
        return whole[256:-256].view(shape)

    def guarded_like(self: Tensor, shape: Any, **_: Any) -> Tensor:
        return guarded(shape, dtype=self.dtype, device=self.device)

    q_video, q_audio, v_video, v_audio, heads = tensors(device=DEVICE, batch=1, video=35, audio=33, heads=1, size=20)
    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(Tensor, "new_empty", guarded_like)
    results = launch.forward(q_video, q_audio, v_video, v_audio, heads)
    launch.backward(results[0], results[1], q_video, q_audio, v_video, v_audio, *results, heads)
    monkeypatch.undo()
    assert len(allocated) == 7 + 6
    for whole in allocated:
        assert (whole[:256] == 7).all() and (whole[-256:] == 7).all()


@fused
@pytest.mark.parametrize(("batch", "video", "audio"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(batch: int, video: int, audio: int, backend: str) -> None:
    args = tensors(batch=batch, video=video, audio=audio, heads=2, size=8)
    expected = with_gradients(ModelOps().bidirectional_attention, args)
    for name, value in with_gradients(partial(bidirectional_attention, backend=backend), args).items():
        assert torch.equal(value, expected[name]), name


@fused
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted: bool, backend: str) -> None:
    *inputs, heads = tensors(batch=2, video=6, audio=5, heads=1, size=8)
    if permuted:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    tests = ("test_schema", "test_faketensor")  # gradients go through the autograd.Function, not through the op
    suffix = "_native" if backend == "cpu" else ""
    forward = getattr(torch.ops.javis, f"bidirectional_attention{suffix}").default
    backward = getattr(torch.ops.javis, f"bidirectional_attention{suffix}_backward").default
    torch.library.opcheck(forward, (*inputs, heads), test_utils=tests)
    results = forward(*inputs, heads)
    gradients = [torch.randn_like(y) for y in results[:2]]
    torch.library.opcheck(backward, (*gradients, *inputs, *results, heads), test_utils=tests)


@needs_native
def test_native_ops_say_what_they_write_and_refuse_what_does_not_fit() -> None:
    ops = torch.ops.javis_native
    scores, part = torch.randn(2, 4, 6), torch.zeros(2, 4, 6)
    rows, columns = torch.zeros(2, 4), [torch.zeros(2, 6) for _ in range(3)]
    arguments = (scores, part, rows, *columns, 0.5)
    torch.library.opcheck(ops.bidirectional_softmaxes.default, arguments, test_utils=("test_schema",))
    backward = (scores, part, torch.zeros(2, 4, 6), rows, rows, columns[0], columns[1], 0.5)
    torch.library.opcheck(ops.bidirectional_score_gradient.default, backward, test_utils=("test_schema",))
    with pytest.raises(RuntimeError, match="columns_part has size 5"):
        ops.bidirectional_softmaxes(scores, torch.zeros(2, 4, 5), *arguments[2:])
    with pytest.raises(RuntimeError, match="row_lse has the wrong dtype"):
        ops.bidirectional_softmaxes(scores, part, rows.double(), *columns, 0.5)
    with pytest.raises(RuntimeError, match="dense within a head"):
        ops.bidirectional_softmaxes(scores.mT.contiguous().mT, *arguments[1:])


# 5. torch.compile --------------------------------------------------------------------------------------------------

BRANCHES = {
    "cpu": pytest.param("auto", torch.float32, ["javis::bidirectional_attention_native"], marks=needs_native),
    "triton": pytest.param("triton", torch.float32, ["javis::bidirectional_attention"], marks=needs_triton),
    "sdpa": ("sdpa", torch.float16, ["aten::scaled_dot_product_attention"]),
    "reference": ("auto", torch.float64, []),
}


@pytest.mark.parametrize(("backend", "dtype", "ops"), BRANCHES.values(), ids=BRANCHES.keys())
def test_compiles_to_one_graph(backend: str, dtype: torch.dtype, ops: list[str]) -> None:
    torch.compiler.reset()
    args = tensors(dtype, batch=1, video=6, audio=5, heads=1, size=8)
    function = partial(bidirectional_attention, backend=backend)
    # aot_eager traces forward and backward through the fakes like the default backend, without compiling C++ loops.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, args)
    for name, value in with_gradients(function, args).items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")
    if backend != "sdpa":  # which is decomposed
        assert ops_that_ran(lambda: with_gradients(compiled, args)) == ops + [f"{op}_backward" for op in ops]


@needs_native
def test_compiled_code_follows_use_backend() -> None:
    torch.compiler.reset()
    args = tensors(batch=1, video=6, audio=5, heads=1, size=8)
    compiled = torch.compile(bidirectional_attention, fullgraph=True, backend="aot_eager")
    assert ops_that_ran(lambda: compiled(*args))
    with use_backend("reference"):
        assert not ops_that_ran(lambda: compiled(*args))
    assert ops_that_ran(lambda: compiled(*args))


# 6. and 7. The choice ----------------------------------------------------------------------------------------------


def test_the_named_backend_is_the_one_that_runs() -> None:
    args = tensors(batch=1, video=6, audio=5, heads=1, size=8)
    expected = {
        "reference": [],
        "sdpa": ["aten::scaled_dot_product_attention"],
    }
    if native.WHY_NOT is None:
        native_ops = ["javis::bidirectional_attention_native", "javis::bidirectional_attention_native_backward"]
        expected |= {"cpu": native_ops, "auto": native_ops}
    if HAS_TRITON:
        expected["triton"] = ["javis::bidirectional_attention", "javis::bidirectional_attention_backward"]
    for backend, ops in expected.items():
        run = partial(bidirectional_attention, backend=backend)
        assert ops_that_ran(lambda run=run: with_gradients(run, args)) == ops, backend
        with use_backend(backend):
            assert ops_that_ran(lambda: with_gradients(bidirectional_attention, args)) == ops, backend
            assert ops_that_ran(lambda: reference(*args)) == []  # the call's own word counts most


@pytest.mark.parametrize(
    ("backend", "dtype", "why"),
    [
        ("cuda", torch.float32, "no CUDA kernel in this version"),
        ("flash_attn", torch.float32, "this op has no such implementation"),
        ("cpu", torch.float64, "float64|not built"),
        ("cpu", torch.float16, "float16|not built"),
        ("triton", torch.float64, "float64|not installed"),
        ("sdpa", torch.float64, "float64 goes to the reference"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend: str, dtype: torch.dtype, why: str) -> None:
    args = tensors(dtype, batch=1, video=3, audio=2, heads=1, size=8)
    with pytest.raises(UsageError, match=why):
        bidirectional_attention(*args, backend=backend)
    with use_backend(backend), pytest.raises(UsageError, match=why):
        bidirectional_attention(*args)


def test_what_the_triton_kernels_and_sdpa_cannot_hold() -> None:
    wide = tensors(batch=1, video=3, audio=2, heads=1, size=136)
    assert contract.why_not_triton(*wide) == "head size 136, the kernels hold up to 128"
    many = [torch.empty(70000, n, 1, device="meta") for n in (3, 2, 3, 2)]
    assert contract.why_not_triton(*many, 1) == "batch * heads is 70000, a launch grid holds up to 65535"
    empty = tensors(batch=1, video=3, audio=0, heads=1, size=8)
    with pytest.raises(UsageError, match="nothing to attend to"):
        bidirectional_attention(*empty, backend="sdpa")


@every_dtype
def test_sdpa_is_within_budget(dtype: torch.dtype) -> None:
    args = tensors(dtype, batch=2, video=40, audio=20, heads=2, size=72)
    check_budget(partial(bidirectional_attention, backend="sdpa"), args, ModelOps().bidirectional_attention)


def test_float16_and_float64_run_under_auto() -> None:
    for dtype in (torch.float16, torch.float64):
        results = bidirectional_attention(*tensors(dtype, batch=1, video=3, audio=2, heads=1, size=8))
        assert [y.dtype for y in results] == [dtype, dtype]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_video": torch.zeros(2, 12)}, "q_video must be"),
        ({"q_video": torch.zeros(2, 6, 12, dtype=torch.long)}, "q_video must be"),
        ({"num_heads": 5}, "num_heads must divide"),
        ({"num_heads": 0}, "num_heads must divide"),
        ({"q_audio": torch.zeros(2, 3, 11)}, "q_audio must be"),
        ({"q_audio": torch.zeros(1, 3, 12)}, "q_audio must be"),
        ({"v_video": torch.zeros(2, 3, 12)}, "v_video must be"),
        ({"v_audio": torch.zeros(2, 6, 12)}, "v_audio must be"),
        ({"v_audio": torch.zeros(2, 3, 12, dtype=torch.bfloat16)}, "v_audio must be torch.float32 like q_video, got"),
        ({"v_audio": torch.zeros(2, 3, 12, device="meta")}, "v_audio must be on cpu like q_video, got meta"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    video, audio = torch.zeros(2, 6, 12), torch.zeros(2, 3, 12)
    arguments = {"q_video": video, "q_audio": audio, "v_video": video, "v_audio": audio, "num_heads": 3} | change
    with pytest.raises(ValueError, match=message):
        bidirectional_attention(**arguments)


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
