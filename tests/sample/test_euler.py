"""The denoise loop with models whose velocity is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from javis.flow import timesteps
from javis.model.dit import Velocity
from javis.sample import Guidance, sample
from javis.sample.euler import Step

VIDEO, AUDIO = (2, 3, 4, 2, 2), (2, 5, 6, 3)


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class FakeModel:
    """Answers with ``velocity(modality, latents, t)`` and keeps what it was asked; B or, guided, 2B samples."""

    def __init__(self, velocity: Any) -> None:
        self.velocity, self.calls = velocity, []

    def denoise(self, video: Tensor, audio: Tensor, t: Tensor, condition: Any, **masks: Tensor | None) -> Velocity:
        self.calls.append(SimpleNamespace(video=video, audio=audio, t=t, condition=condition, **masks))
        return Velocity(self.velocity("video", video, t), self.velocity("audio", audio, t))


def condition(samples: int = 2) -> Any:
    return SimpleNamespace(fps=torch.zeros(samples, 1))


def run(model: Any, steps: int | Tensor = 4, samples: int = 2, **options: Any) -> tuple[Tensor, Tensor]:
    times = timesteps(steps) if isinstance(steps, int) else steps
    return sample(model, draw(VIDEO), draw(AUDIO, 1), condition(samples), times, **options)


def towards(video: Tensor, audio: Tensor) -> FakeModel:
    """The velocity ``data - noise`` of the straight path from the starting latents to these."""
    speed = {"video": video - draw(VIDEO), "audio": audio - draw(AUDIO, 1)}
    return FakeModel(lambda name, z, t: speed[name].repeat(len(z) // 2, 1, *[1] * (z.ndim - 2)))


def wavy(name: str, z: Tensor, t: Tensor) -> Tensor:
    """A velocity that depends on everything, different in both halves of a guided batch."""
    number = torch.arange(len(z)).view(-1, *[1] * (z.ndim - 1)) + (1 if name == "video" else 7)
    return torch.sin(z * number) + t.view(-1, *[1] * (z.ndim - 1)) / 1000


# -- Euler -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 60), ratio=st.floats(0.3, 5.0))
def test_a_straight_path_is_exact_in_any_number_of_steps(steps: int, ratio: float) -> None:
    data = draw(VIDEO, 5), draw(AUDIO, 6)
    model = towards(*data)
    for out, expected in zip(run(model, timesteps(steps, ratio)), data, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(model.calls) == steps


def test_a_curved_path_is_integrated_with_first_order() -> None:
    """dz/ds = z for s from 0 to 1: the factor is (1 + 1/n)^n, which tends to e."""
    for steps in (1, 2, 7, 50):
        out, _ = run(FakeModel(lambda _name, z, _t: z), steps)
        torch.testing.assert_close(out, draw(VIDEO) * (1 + 1 / steps) ** steps, rtol=1e-4, atol=1e-4)


def test_timesteps_reach_the_model_and_channels_of_sigma_do_not_matter() -> None:
    model = FakeModel(lambda _name, z, _t: torch.cat((torch.zeros_like(z), torch.full_like(z, 9.0)), 1))
    times = timesteps(5, 2.0)
    out = run(model, times)
    assert torch.equal(out[0], draw(VIDEO)) and torch.equal(out[1], draw(AUDIO, 1))
    assert torch.equal(torch.stack([c.t for c in model.calls]), times[:, None].expand(-1, 2))
    assert all(c.video_mask is None and c.audio_mask is None for c in model.calls)


def test_callback_sees_every_step_before_its_update() -> None:
    seen: list[Step] = []
    data = draw(VIDEO, 5), draw(AUDIO, 6)
    run(towards(*data), 4, callback=seen.append)
    assert [s.number for s in seen] == [0, 1, 2, 3]
    assert [s.timestep for s in seen] == [1000, 750, 500, 250]
    for step in seen:
        torch.testing.assert_close(step.video, torch.lerp(draw(VIDEO), data[0], step.number / 4), rtol=1e-4, atol=1e-5)
        assert step.video_input is step.video


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_guidance_1_is_the_conditional_model() -> None:
    guided = run(FakeModel(wavy), samples=4, guidance=1.0)
    plain = run(FakeModel(wavy), samples=2)
    for a, b in zip(guided, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_guidance_is_linear_in_each_modality() -> None:
    """One step from t = 1000 adds v_u + s (v_c - v_u), with its own scale for each modality."""
    scales = Guidance(video=3.0, audio=0.0)
    out = run(FakeModel(wavy), 1, samples=4, guidance=scales)
    for name, z, moved, scale in zip(("video", "audio"), (draw(VIDEO), draw(AUDIO, 1)), out, scales, strict=True):
        both = wavy(name, torch.cat((z, z)), torch.full((4,), 1000.0))
        expected = z + scale * both[:2] + (1 - scale) * both[2:]
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)


def test_guided_model_sees_each_sample_twice() -> None:
    model = FakeModel(wavy)
    run(model, 2, samples=4, guidance=2.0, video_mask=torch.tensor([[0.0, 1, 1, 1], [1, 1, 0, 1]]))
    for call in model.calls:
        for name in ("video", "audio", "t", "video_mask", "audio_mask"):
            first, second = getattr(call, name).chunk(2)
            assert torch.equal(first, second), name


# -- masks -------------------------------------------------------------------------------------------------------------


def test_masks_of_ones_change_nothing() -> None:
    masked = run(FakeModel(wavy), video_mask=torch.ones(2, 4), audio_mask=torch.ones(2, 6))
    for a, b in zip(masked, run(FakeModel(wavy)), strict=True):
        assert torch.equal(a, b)


def test_given_frames_are_kept_and_shown_as_given() -> None:
    model = FakeModel(wavy)
    mask = torch.tensor([[0.0, 1, 0, 1], [1, 1, 1, 0]])
    video, audio = run(model, 5, video_mask=mask)
    free, free_audio = run(FakeModel(wavy), 5)
    keep = (mask == 0)[:, None, :, None, None].expand_as(video)
    assert torch.equal(video[keep], draw(VIDEO)[keep])
    assert torch.equal(video[~keep], free[~keep])  # this model's frames do not see each other
    assert torch.equal(audio, free_audio)  # the other modality is generated in full
    for call in model.calls:
        assert torch.equal(call.video[keep], draw(VIDEO)[keep])
        assert torch.equal(call.video_mask, mask == 1) and call.audio_mask.all()


@pytest.mark.parametrize(
    ("ratio", "first"), [(1.0, 0), (0.8, 1), (0.6, 2), (0.59, 3), (0.2, 4), (0.1, None), (0.0, None)]
)
def test_edited_frames_start_at_their_share_of_noise(ratio: float, first: int | None) -> None:
    """With timesteps 1000, 800, ... 200, a frame of mask m takes part from the first one that is at most 1000 m."""
    model = FakeModel(wavy)
    steps: list[Step] = []
    mask = torch.ones(2, 6)
    mask[:, 2] = ratio
    given = draw(AUDIO, 1)[:, :, 2]
    noise = {VIDEO: torch.zeros(VIDEO), AUDIO: draw(AUDIO, 8)}
    audio = run(model, 5, audio_mask=mask, draw_noise=lambda z: noise[tuple(z.shape)], callback=steps.append)[1]
    start = 5 if first is None else first
    for step, call in zip(steps, model.calls, strict=True):
        assert bool(step.audio_mask[:, 2].all()) == bool(step.audio_mask[:, 2].any()) == (step.number >= start)
        assert torch.equal(call.audio_mask, step.audio_mask)
        seen = step.audio_input[:, :, 2]
        if step.number <= start:
            assert torch.equal(step.audio[:, :, 2], given)
        if step.number < start:
            assert torch.equal(seen, given)
        elif step.number == start > 0:
            share = step.timestep / 1000
            torch.testing.assert_close(seen, (1 - share) * given + share * noise[AUDIO][:, :, 2])
        else:
            assert torch.equal(seen, step.audio[:, :, 2])
    assert torch.equal(audio[:, :, 2], given) == (first is None)


def test_noise_of_edits_is_drawn_once_per_step_and_modality() -> None:
    shapes: list[tuple[int, ...]] = []

    def draw_noise(z: Tensor) -> Tensor:
        shapes.append(tuple(z.shape))
        return torch.zeros_like(z)

    run(FakeModel(wavy), 3, video_mask=torch.zeros(2, 4), draw_noise=draw_noise)
    assert shapes == [VIDEO, AUDIO] * 3


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(ValueError, match="guidance .* needs the unconditional samples"):
        run(FakeModel(wavy), guidance=2.0)
    with pytest.raises(ValueError, match="conditioning is for 3 samples, expected 2 or, guided, 4"):
        run(FakeModel(wavy), samples=3)
