"""Onset times against planted ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from javis.eval.onsets import audio_onsets, source_onsets
from javis.world import parse_prompt, render_audio, scene_from_prompt
from tests.eval.clips import damaged_audio, struck

RATE = 16000


def assert_times(found: list[float], truth: list[float], tolerance: float) -> None:
    assert len(found) == len(truth), (found, truth)
    np.testing.assert_allclose(found, sorted(truth), atol=tolerance, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.1, 0.45), min_size=1, max_size=4), st.floats(250, 3000), st.sampled_from([8000, 16000, 44100])
)
def test_planted_strikes_are_found(gaps: list[float], hz: float, rate: int) -> None:
    truth = list(np.cumsum(np.maximum(gaps, 0.25)) - 0.15)
    found = [e.time for e in audio_onsets(struck(truth, hz=hz, rate=rate), rate)]
    assert_times(found, truth, 0.006)


def test_a_shift_is_recovered() -> None:
    truth = [0.3, 0.9, 1.4]
    still = np.array([e.time for e in audio_onsets(struck(truth), RATE)])
    for shift in (0.013, 0.05, 0.111):
        moved = np.array([e.time for e in audio_onsets(struck([t + shift for t in truth]), RATE)])
        np.testing.assert_allclose(moved - still, shift, atol=0.001)


@pytest.mark.parametrize(
    "audio", [np.zeros(32000), np.zeros(0), np.full(32000, 0.3)], ids=["silent", "empty", "constant"]
)
def test_nothing_sounds(audio: np.ndarray) -> None:
    assert audio_onsets(audio, RATE) == []


def test_faint_noise_is_no_event() -> None:
    noise = np.random.default_rng(0).normal(0, 1e-3, 32000)
    assert audio_onsets(noise, RATE) == []


def test_a_held_tone_starts_once() -> None:
    t = np.arange(32000) / RATE
    tone = 0.3 * np.sin(2 * np.pi * 440 * t) * (t > 0.5) * (1 + 0.2 * np.sin(2 * np.pi * 6 * t))
    assert_times([e.time for e in audio_onsets(tone, RATE)], [0.5], 0.01)


@pytest.mark.parametrize("damage", [False, True], ids=["clean", "griffin_lim"])
@pytest.mark.parametrize(
    "prompt",
    [
        "a large red wooden ball bounces on the left and a small blue glass box knocks on the right",
        "a large red metal ball bounces on the left and a small blue star flashes on the right",
        "a small red wooden box knocks on the left and a small blue metal star bounces on the right",
        "a large white ball flashes on the left and an unseen small glass bell rings",
    ],
)
def test_two_sources_are_told_apart(prompt: str, damage: bool) -> None:
    for seed in range(3):
        scene = scene_from_prompt(prompt, seed)
        audio = render_audio(scene)
        audio = damaged_audio(audio, seed) if damage else audio
        found = source_onsets(audio, RATE, parse_prompt(prompt))
        for index, source in enumerate(scene.sources):
            truth = [e.time for e in source.events]
            assert_times([e.time for e in found if e.source == index], truth, 0.02 if damage else 0.006)


def test_a_single_source_gets_every_onset_whatever_it_sounds_like() -> None:
    clauses = parse_prompt("a large red wooden ball bounces on the left")
    found = source_onsets(struck([0.4, 1.0], hz=2500), RATE, clauses)
    assert [e.source for e in found] == [0, 0]
    assert_times([e.time for e in found], [0.4, 1.0], 0.006)


def test_what_is_silent_gets_no_onsets() -> None:
    clauses = parse_prompt("a red ball floats silently on the left")
    assert [e.source for e in source_onsets(struck([0.4]), RATE, clauses)] == [None]


def test_unusable_audio_is_refused() -> None:
    with pytest.raises(ValueError, match="mono"):
        audio_onsets(np.zeros((2, 100)), RATE)
    with pytest.raises(ValueError, match="NaN"):
        audio_onsets(np.full(100, np.nan), RATE)
    with pytest.raises(ValueError, match="sample rate"):
        audio_onsets(np.zeros(100), 0)
