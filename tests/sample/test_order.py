"""Together or sound first, with models whose velocity is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from javis.flow import timesteps
from javis.sample import sample, sample_in_order

from .test_euler import AUDIO, VIDEO, FakeModel, condition, draw, wavy


def run(model: Any, steps: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return sample_in_order(model, draw(VIDEO), draw(AUDIO, 1), condition(), steps, ratio=3.0, **options)


def test_together_is_one_run_of_the_sampler() -> None:
    expected = sample(FakeModel(wavy), draw(VIDEO), draw(AUDIO, 1), condition(), timesteps(5, 3.0))
    for a, b in zip(run(FakeModel(wavy), 5), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("steps", "first"), [(2, 1), (5, 3), (16, 8)])
def test_the_sound_is_made_first_and_then_given_clean(steps: int, first: int) -> None:
    model, seen = FakeModel(wavy), []
    video, audio = run(model, steps, order="sound_first", callback=seen.append)
    together = FakeModel(wavy)
    _, sound = run(together, first)
    assert torch.equal(audio, sound)
    assert [step.number for step in seen] == list(range(steps))
    assert [call.audio_mask is None for call in model.calls] == [True] * first + [False] * (steps - first)
    for number, call in enumerate(model.calls[first:]):
        assert torch.equal(call.audio, sound)
        assert not call.audio_mask.any() and call.video_mask.all()
        assert call.t[0] == timesteps(steps - first, 3.0)[number]
    # Nothing of the first picture is left: the second starts from the same noise.
    assert torch.equal(model.calls[first].video, draw(VIDEO))
    expected, _ = sample(FakeModel(wavy), draw(VIDEO), draw(AUDIO, 1), condition(), timesteps(steps - first, 3.0))
    torch.testing.assert_close(video, expected)


@pytest.mark.parametrize("by_schedule", [False, True])
def test_the_picture_can_be_made_again_from_its_draft(by_schedule: bool) -> None:
    """From 900 on: the draft with that share of its own noise; even in untransformed time, ratio 3: u = 0.75."""
    times = [1000 * 3 * u / (1 + 2 * u) for u in (0.75, 0.375)]
    options: dict[str, Any] = {"redraw": 900.0}
    if by_schedule:
        options = {"schedule": lambda counts: [timesteps(counts[0], 3.0), torch.tensor(times)]}
    model = FakeModel(wavy)
    _, audio = run(model, 5, order="sound_first", audio_steps=3, **options)
    draft, sound = run(FakeModel(wavy), 3)
    again = model.calls[3:]
    assert torch.equal(audio, sound) and all(torch.equal(call.audio, sound) for call in again)
    assert [float(call.t[0]) for call in again] == pytest.approx(times)
    torch.testing.assert_close(again[0].video, 0.1 * draft + 0.9 * draw(VIDEO))


def test_redrawing_from_noise_is_the_default() -> None:
    for a, b in zip(*(run(FakeModel(wavy), 4, order="sound_first", redraw=r) for r in (None, 1000.0)), strict=True):
        assert torch.equal(a, b)


def test_redrawing_keeps_a_picture_of_a_flow_that_goes_straight() -> None:
    """Where the velocity is x - noise of one clip, the draft is the clip, and so is what is made of it anywhere."""
    clip = draw(VIDEO, 5)

    class Straight(FakeModel):
        def denoise(self, video: torch.Tensor, audio: torch.Tensor, timestep: torch.Tensor, *rest: Any, **more: Any):
            out = super().denoise(video, audio, timestep, *rest, **more)
            s = (timestep / 1000).view(-1, 1, 1, 1, 1)
            return out._replace(video=(clip - video) / s)

    for redraw in (1000.0, 700.0, 20.0):
        video, _ = run(Straight(wavy), 4, order="sound_first", redraw=redraw)
        torch.testing.assert_close(video, clip, rtol=0, atol=1e-5)


def test_a_single_step_is_done_together() -> None:
    model = FakeModel(wavy)
    run(model, 1, order="sound_first")
    assert len(model.calls) == 1 and model.calls[0].audio_mask is None


def test_the_generator_of_the_process_is_left_alone() -> None:
    torch.manual_seed(5)
    run(FakeModel(wavy), 4, order="sound_first")
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_unusable_arguments() -> None:
    with pytest.raises(ValueError, match="order must be 'together' or 'sound_first', got 'picture_first'"):
        run(FakeModel(wavy), 4, order="picture_first")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        run(FakeModel(wavy), 0)
