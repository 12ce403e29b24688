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
