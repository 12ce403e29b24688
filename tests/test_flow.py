"""Rectified flow: closed forms of path, timesteps and losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from javis.flow import (
    add_noise,
    flow_losses,
    masked_mean,
    sample_timesteps,
    timestep_ratio,
    timesteps,
    transform_timestep,
)

VIDEO, AUDIO = (2, 3, 4, 2, 2), (2, 5, 6, 3)  # latents of two samples


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- path --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [VIDEO, AUDIO])
def test_path_starts_at_data_and_ends_at_noise(shape: tuple[int, ...]) -> None:
    x, noise = draw(shape), draw(shape, 1)
    assert torch.equal(add_noise(x, noise, torch.zeros(2)), x)
    assert torch.equal(add_noise(x, noise, torch.full((2,), 1000.0)), noise)
    t = torch.tensor([250.0, 900.0])
    out = add_noise(x, noise, t)
    for i, share in enumerate((0.25, 0.9)):
        torch.testing.assert_close(out[i], (1 - share) * x[i] + share * noise[i])


@pytest.mark.parametrize("shape", [VIDEO, AUDIO])
def test_every_frame_may_have_its_own_time(shape: tuple[int, ...]) -> None:
    x, noise = draw(shape), draw(shape, 1)
    t = 1000 * torch.rand(2, shape[2], generator=torch.Generator().manual_seed(2))
    out = add_noise(x, noise, t)
    for i in range(2):
        for frame in range(shape[2]):
            expected = torch.lerp(x[i, :, frame], noise[i, :, frame], float(t[i, frame]) / 1000)
            torch.testing.assert_close(out[i, :, frame], expected)


# -- timesteps ---------------------------------------------------------------------------------------------------------

times = st.floats(0, 1000)
ratios = st.floats(0.05, 20)


@settings(max_examples=100, deadline=None)
@given(t=times, other=times, ratio=ratios)
def test_transform_is_monotone_with_fixed_ends_and_known_inverse(t: float, other: float, ratio: float) -> None:
    def transform(value: float, r: float) -> float:
        return float(transform_timestep(torch.tensor(value, dtype=torch.float64), r))

    assert transform(0.0, ratio) == 0
    assert transform(1000.0, ratio) == pytest.approx(1000)
    assert transform(t, 1.0) == pytest.approx(t)
    assert transform(transform(t, ratio), 1 / ratio) == pytest.approx(t, abs=1e-6)
    assert (transform(t, ratio) - t) * (ratio - 1) >= -1e-9  # larger clips get more noise
    if t < other:
        assert transform(t, ratio) <= transform(other, ratio)


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 200), ratio=ratios)
def test_timesteps_fall_from_1000(steps: int, ratio: float) -> None:
    t = timesteps(steps, ratio).double()
    assert t.shape == (steps,)
    assert float(t[0]) == pytest.approx(1000)
    assert (t.diff() < 0).all()
    share = 1 - np.arange(steps) / steps
    np.testing.assert_allclose(t, 1000 * ratio * share / (1 + (ratio - 1) * share), rtol=1e-4, atol=1e-3)


def test_timesteps_per_sample_and_too_few_steps() -> None:
    both = timesteps(5, torch.tensor([1.0, 3.0]))
    assert torch.equal(both[:, 0], timesteps(5)) and torch.equal(both[:, 1], timesteps(5, 3.0))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        timesteps(0)


def test_ratio_is_the_root_of_area_and_latent_frames() -> None:
    def ratio(height: float, width: float, frames: int) -> float:
        return float(timestep_ratio(torch.tensor([height]), torch.tensor([width]), torch.tensor([frames]))[0])

    assert ratio(512, 512, 1) == 1
    assert ratio(256, 256, 1) == 0.5
    assert ratio(512, 512, 51) == pytest.approx(math.sqrt(15))  # 3 windows of 17 frames are 15 latent frames
    assert ratio(240, 426, 34) == pytest.approx(math.sqrt(240 * 426 / 512**2 * 10))
    for frames in range(2, 17):  # fewer than one window
        assert ratio(512, 512, frames) == 1
        assert timesteps(4, ratio(512, 512, frames)).isfinite().all()


def test_training_timesteps_are_logit_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    t = sample_timesteps(20000, generator=generator).double() / 1000
    normal = (t / (1 - t)).log()
    assert abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.03
    uniform = sample_timesteps(20000, generator=generator, logit_std=None) / 1000
    assert abs(float((uniform < 0.25).double().mean()) - 0.25) < 0.02
    shifted = sample_timesteps(20000, generator=generator, ratio=3.0).double() / 1000
    share = shifted / (3 - 2 * shifted)  # inverse of the shift
    assert abs(float((share / (1 - share)).log().mean())) < 0.03


def test_training_timesteps_follow_the_generator() -> None:
    a, b, c = (sample_timesteps(8, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [VIDEO, AUDIO])
def test_masked_mean(shape: tuple[int, ...]) -> None:
    error = draw(shape).square()
    torch.testing.assert_close(masked_mean(error, None), torch.stack([e.mean() for e in error]))
    mask = torch.zeros(2, shape[2]).bool()
    mask[0, 1:3] = True
    mean = masked_mean(error, mask)
    torch.testing.assert_close(mean[0], error[0, :, 1:3].mean(), rtol=1e-5, atol=1e-6)
    assert float(mean[1]) == 1  # nothing to learn: eps / eps, as in the official code
    torch.testing.assert_close(
        masked_mean(error, torch.ones_like(mask)), masked_mean(error, None), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("masked", [False, True])
def test_flow_losses_by_hand(masked: bool) -> None:
    video, audio = draw(VIDEO), draw(AUDIO, 1)
    noises = draw(VIDEO, 2), draw(AUDIO, 3)
    t = torch.tensor([300.0, 800.0])
    masks: list[Tensor | None] = [None, None]
    if masked:
        masks = [torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool(), torch.tensor([[1] * 6, [0, 1] * 3]).bool()]
    answers = draw((2, 6, *VIDEO[2:]), 4), draw((2, 5, *AUDIO[2:]), 5)  # the video answer has the channels of sigma too
    seen = {}

    def denoise(v: Tensor, a: Tensor, at: Tensor, **given: Tensor | None) -> tuple[Tensor, Tensor]:
        seen.update(video=v, audio=a, t=at, **given)
        return answers

    losses = flow_losses(
        denoise, video, audio, t, video_noise=noises[0], audio_noise=noises[1], video_mask=masks[0], audio_mask=masks[1]
    )
    assert torch.equal(seen["t"], t) and seen["video_mask"] is masks[0] and seen["audio_mask"] is masks[1]
    total = np.zeros(2)
    for name, x, noise, mask, answer in zip(("video", "audio"), (video, audio), noises, masks, answers, strict=True):
        for i in range(2):
            errors = []
            for frame in range(x.shape[2]):
                noisy = mask is None or bool(mask[i, frame])
                share = float(t[i]) / 1000 if noisy else 0.0
                given = (1 - share) * x[i, :, frame] + share * noise[i, :, frame]
                torch.testing.assert_close(seen[name][i, :, frame], given)
                if noisy:
                    target = (x - noise)[i, :, frame].double()
                    errors.append(float((answer[i, : x.shape[1], frame].double() - target).square().mean()))
            assert float(getattr(losses, name)[i]) == pytest.approx(np.mean(errors), rel=1e-4)
            total[i] += np.mean(errors)
    np.testing.assert_allclose(losses.total, total, rtol=1e-4)


def test_the_true_velocity_has_no_loss() -> None:
    video, audio, noises = draw(VIDEO), draw(AUDIO, 1), (draw(VIDEO, 2), draw(AUDIO, 3))
    losses = flow_losses(
        lambda *_, **__: (video - noises[0], audio - noises[1]),
        video, audio, torch.tensor([10.0, 990.0]), video_noise=noises[0], audio_noise=noises[1],
    )  # fmt: skip
    assert torch.equal(losses.total, torch.zeros(2))
