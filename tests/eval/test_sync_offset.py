"""The offset of a clip: closed forms on event lists, planted shifts on real clips, and when it is not known."""

from __future__ import annotations

import numpy as np
import pytest

from javis.eval.damage import shift_sound
from javis.eval.onsets import HOP
from javis.eval.sync_offset import find_offset
from javis.eval.sync_score import Evidence, lag_correlation
from javis.world import render_audio, render_video, scene_from_prompt

RATE, FPS = 16000, 16.0


def evidence(seen: list[float], heard: list[float], *, seconds: float = 2.0, curves: bool = False) -> Evidence:
    """Events alone; with ``curves`` also bells of motion and of onset strength around them."""
    between = (np.arange(round(seconds * FPS) - 1) + 0.5) / FPS
    times = np.arange(round(seconds / HOP)) * HOP
    motion = sum((np.exp(-(((between - t) / 0.06) ** 2)) for t in seen), np.zeros(len(between)))
    onset = sum((np.exp(-(((times - t) / 0.02) ** 2)) for t in heard), np.zeros(len(times)))
    on = 1.0 if curves else 0.0
    return Evidence(seen, heard, on * motion, 0 * motion, on * onset, FPS, seconds, seconds)


@pytest.mark.parametrize("shift", [-0.5, -0.1237, 0.0, 0.041, 0.3333])
def test_a_shift_of_uneven_events_comes_back_exactly(shift: float) -> None:
    seen = [0.55, 0.81, 1.32]
    found = find_offset(evidence(seen, [t + shift for t in seen if 0 <= t + shift < 2.0]))
    assert found.method == "events" and found.seconds == pytest.approx(shift, abs=1e-4)
    assert found.confidence > 0.1


def test_what_the_edge_cut_off_does_not_speak_against_a_shift() -> None:
    """0.5 s late, the last of three sounds is lost; it is not held to be missing."""
    found = find_offset(evidence([0.3, 0.71, 1.7], [0.8, 1.21]))
    assert found.seconds == pytest.approx(0.5, abs=1e-4)
    # In the middle of the clip it would be: one of the three is then a sound that does not fit.
    assert find_offset(evidence([0.3, 0.71, 1.2], [0.8, 1.21])).confidence < found.confidence


def test_the_mean_of_the_pairs_and_its_half_millisecond() -> None:
    found = find_offset(evidence([0.5, 1.0, 1.43], [0.61, 1.13, 1.55]))
    assert found.seconds == pytest.approx((0.11 + 0.13 + 0.12) / 3, abs=1e-4)


def test_a_periodic_clip_is_known_to_be_ambiguous() -> None:
    """A pendulum every 0.71 s, its sound 0.4 s early: 0.31 s late explains what is left of it as well."""
    seen = [0.25, 0.96, 1.67]
    assert find_offset(evidence(seen, [0.56, 1.27])).confidence < 0.05
    uneven = find_offset(evidence([0.25, 0.85, 1.67], [0.45, 1.27]))
    assert uneven.seconds == pytest.approx(-0.4, abs=1e-4) and uneven.confidence > 0.2


def test_the_energies_decide_where_no_event_is_found() -> None:
    both = evidence([0.4, 0.9, 1.5], [0.5, 1.0, 1.6], curves=True)
    blind = Evidence([], [], both.motion, both.restless, both.onset, FPS, 2.0, 2.0)
    found = find_offset(blind)
    assert found.method == "energy" and found.seconds == pytest.approx(0.1, abs=0.01)
    assert find_offset(both).energy_seconds == pytest.approx(found.seconds)
    assert lag_correlation(both, [0.1])[0] > 0.9 > lag_correlation(both, [0.0])[0]


def test_nothing_to_see_or_hear_has_no_offset() -> None:
    for nothing in (evidence([], []), evidence([0.5], []), evidence([], [0.5])):
        found = find_offset(nothing)
        assert found.seconds is None and found.method == "none" and found.confidence == 0
        assert found.report()["offset_ms"] is None
    assert find_offset(evidence([0.1], [0.1], seconds=0.0625)).seconds == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("prompt", ["a large red metal ball bounces on the left", "a small blue star flashes"])
def test_real_clips_shifted_by_known_amounts(prompt: str) -> None:
    scene = scene_from_prompt(prompt, 5)
    video, audio = render_video(scene), render_audio(scene)
    for shift in (-0.4, -0.05, 0.0, 0.125, 0.3):
        found = find_offset(Evidence.of(video, shift_sound(audio, shift, RATE), FPS, RATE))
        assert found.seconds == pytest.approx(shift, abs=0.010)
        report = found.report()
        assert report["abs_offset_ms"] == abs(report["offset_ms"]) and 0 <= report["confidence"] <= 1
