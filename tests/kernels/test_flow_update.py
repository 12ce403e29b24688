"""The ten tests of an op (CONTRIBUTING.md, "Adding an op"), for flow_update. It has no backward pass.

The Triton kernel runs in Triton's interpreter where there is no GPU. Test 9 is in tests/test_imports.py; that the
sampler which uses this op is right, in tests/sample/test_euler.py and tests/golden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import flow_update, triton_support
from javis.kernels.ops.flow_update.cases import FlowUpdateCase
from javis.kernels.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not triton_support.HAS_TRITON, reason="triton is not installed")
triton_op = partial(flow_update, backend="triton")
reference = partial(flow_update, backend="reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL: dict[str, Any] = {"batch": 2, "video": (2, 3, 2, 3), "audio": (3, 5, 4)}
# More than one block in a sample, and an end inside a block.
LONG: dict[str, Any] = {"batch": 2, "video": (4, 3, 10, 9), "audio": (8, 5, 30)}


def inputs(dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    return FlowUpdateCase(name="test", dtype=dtype, **shape).inputs(seed=1, device=DEVICE)


def to(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args)


def by_hand(z: Tensor, v: Tensor, dt: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Sample by sample and frame by frame, in float64."""
    z, v, out = z.double(), v.double(), z.double().clone()
    batch, channels, frames = z.shape[:3]
    for b in range(batch):
        for t in range(frames):
            if mask is not None and not mask[b, t]:
                continue
            speed = v[b, :channels, t]
            if v.shape[0] == 2 * batch:
                other = v[batch + b, :channels, t]
                speed = other + scale * (speed - other)
            out[b, :, t] += speed * float(dt if dt.ndim == 0 else dt[b])
    return out


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [SMALL, SMALL | {"guided": False, "masked": True}, LONG | {"masked": True, "more_channels": False}]
)
def test_is_within_budget_of_the_sums_by_hand(shape: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    (video, audio, *rest), masks = inputs(dtype, **shape)
    velocities, dt, scales = rest[:2], rest[2], rest[3:]
    dt = torch.stack([dt, dt / 3])  # each sample has its own step
    actual = flow_update(video, audio, *velocities, dt, *scales, **masks, backend=backend)
    same = reference(video, audio, *velocities, dt, *scales, **masks)
    names = ("video_mask", "audio_mask")
    for i, z in enumerate((video, audio)):
        exact = by_hand(z, velocities[i], dt, scales[i], masks.get(names[i]))
        assert_within_budget(names[i], actual[i], exact, same[i])


@needs_triton
@pytest.mark.usefixtures("poison")
def test_latents_of_low_precision_are_rounded_once() -> None:
    args, masks = inputs(**SMALL, masked=True)
    low = to(torch.bfloat16, args)
    for actual, wide in zip(triton_op(*low, **masks), triton_op(*to(torch.float32, low), **masks), strict=True):
        assert torch.equal(actual, wide.bfloat16())


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_closed_forms(backend: str) -> None:
    (video, audio, video_v, audio_v, dt, _, _), _ = inputs(**SMALL)
    run = partial(flow_update, backend=backend)
    conditional, unconditional = video_v.chunk(2)
    # Scale 1 is the conditional velocity, 0 the unconditional one; the scales are per modality.
    got, _ = run(video, audio, video_v, audio_v, dt, 1.0, 5.0)
    torch.testing.assert_close(got, video + dt * conditional[:, :2], rtol=1e-6, atol=1e-6)
    got, _ = run(video, audio, video_v, audio_v, dt, 0.0, 5.0)
    torch.testing.assert_close(got, video + dt * unconditional[:, :2], rtol=1e-6, atol=1e-6)
    # A full step along x - noise leads from the noise to x.
    x = torch.randn_like(video)
    got, _ = run(video, audio, x - video, audio_v, 1.0, 1.0, 5.0)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)
    # Frames that do not move keep every bit.
    masks = [torch.zeros(2, frames, dtype=torch.bool, device=DEVICE) for frames in (3, 5)]
    still = run(video, audio, video_v, audio_v, dt, 7.0, 7.0, video_mask=masks[0], audio_mask=masks[1])
    assert torch.equal(still[0], video) and torch.equal(still[1], audio)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_nan_stays_where_it_is(backend: str) -> None:
    args, masks = inputs(**SMALL, masked=True)
    masks["video_mask"][:] = torch.tensor([True, False, True], device=DEVICE)
    args[2][0, 0, 0, 1, 1] = float("nan")
    args[2][1, 0, 1, 1, 1] = float("nan")  # in a frame that keeps its value
    video, audio = flow_update(*args, **masks, backend=backend)
    assert video.isnan().sum() == 1 and video[0, 0, 0, 1, 1].isnan()
    assert audio.isfinite().all()


@needs_triton
def test_any_layout_gives_the_same_and_nothing_is_written_around_it() -> None:
    args, masks = inputs(torch.bfloat16, **SMALL, masked=True)
    expected = triton_op(*args, **masks)
    around = torch.full((2, 2, 3, 2, 9), float("nan"), device=DEVICE)
    around[..., 3:6] = args[0]
    before = around.clone()
    channels_last = args[2].to(memory_format=torch.channels_last_3d)
    mask = {"video_mask": masks["video_mask"].t().contiguous().t(), "audio_mask": masks["audio_mask"]}
    actual = triton_op(around[..., 3:6], args[1], channels_last, *args[3:], **mask)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(around.nan_to_num(7), before.nan_to_num(7))
    assert torch.equal(args[0], around[..., 3:6])  # the old latents are not overwritten


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_nothing_to_do(backend: str) -> None:
    args, masks = inputs(batch=0, video=(2, 3, 2, 3), audio=(3, 5, 4), masked=True)
    video, audio = flow_update(*args, **masks, backend=backend)
    assert video.shape == (0, 2, 3, 2, 3) and audio.shape == (0, 3, 5, 4)
    args, _ = inputs(batch=2, video=(2, 0, 2, 3), audio=(3, 5, 4))  # no video: audio moves all the same
    video, audio = flow_update(*args, backend=backend)
    assert video.numel() == 0 and not torch.equal(audio, args[1])


@needs_triton
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted: bool) -> None:
    args, masks = inputs(**SMALL, masked=True)
    if permuted:
        args = (args[0].transpose(3, 4).contiguous().transpose(3, 4), *args[1:])
    torch.library.opcheck(
        torch.ops.javis.flow_update.default,
        (*args, masks["video_mask"], masks["audio_mask"]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_triton)])
def test_compiles_to_one_graph(backend: str) -> None:
    torch.compiler.reset()
    args, masks = inputs(torch.bfloat16, **SMALL, masked=True)
    run = partial(flow_update, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*args, **masks), run(*args, **masks), strict=True):
        torch.testing.assert_close(actual, expected)


@needs_triton
def test_the_named_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from javis.kernels.ops.flow_update import triton_impl

    launched, launch = [], triton_impl.flow_update
    monkeypatch.setattr(triton_impl, "flow_update", lambda *args: (launched.append(1), launch(*args))[1])
    args, masks = inputs(**SMALL)
    triton_op(*args, **masks)
    assert len(launched) == 1
    reference(*args, **masks)
    if DEVICE == "cpu":  # the interpreter is for proof, not for use
        flow_update(*args, **masks)
    assert len(launched) == 1


def test_a_backend_that_cannot_run_says_why() -> None:
    args, _ = inputs(**SMALL)
    with pytest.raises(UsageError, match="no such implementation"):
        flow_update(*args, backend="cpu")
    with pytest.raises(UsageError, match="float64|not installed|needs a CUDA device"):
        triton_op(*to(torch.float64, args))
    with pytest.raises(UsageError, match="no backward pass"):
        triton_op(args[0].requires_grad_(), *args[1:])
    with torch.no_grad():
        flow_update(args[0].requires_grad_(), *args[1:])


def test_reference_gradients() -> None:
    args, masks = inputs(torch.float64, **SMALL, masked=True)
    leaves = [a.requires_grad_() for a in args[:4]]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, *args[4:], **masks), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": torch.zeros(1, 2, 3, 4)}, "video must be"),
        ({"audio": torch.zeros(2, 3, 5, 4, 1)}, "audio must be"),
        ({"video_velocity": torch.zeros(3, 2, 3, 2, 3)}, "video_velocity must be"),
        ({"audio_velocity": torch.zeros(2, 2, 5, 4)}, "audio_velocity must be"),
        ({"video_velocity": torch.zeros(2, 2, 3, 2, 3)}, "guidance_video must be 1"),
        ({"video_mask": torch.zeros(2, 4, dtype=torch.bool)}, "video_mask must be"),
        ({"audio_mask": torch.zeros(2, 5)}, "audio_mask must be"),
        ({"dt": torch.zeros(3)}, "dt must be"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    args, _ = inputs(**SMALL)
    names = ["video", "audio", "video_velocity", "audio_velocity", "dt", "guidance_video", "guidance_audio"]
    with pytest.raises(ValueError, match=message):
        flow_update(**(dict(zip(names, args, strict=True)) | {k: v.to(DEVICE) for k, v in change.items()}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offsets_beyond_31_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    half = {"dtype": torch.float16, "device": "cuda"}
    video, velocity = torch.zeros(1, 1, 1, 1, 2**31 + 64, **half), torch.ones(1, 1, 1, 1, 2**31 + 64, **half)
    audio = torch.zeros(1, 1, 1, 8, **half)
    moved, _ = triton_op(video, audio, velocity, audio, 1.0)
    assert torch.equal(moved, velocity)
