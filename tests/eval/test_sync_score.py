"""The weight-free sync score: closed forms, and real clips of the world against wrong pairings."""

from __future__ import annotations

import numpy as np
import pytest

from javis.eval.sync_score import Evidence, lag_correlation, sync_score
from javis.world import render_audio, render_video, sample_scene, scene_from_prompt
from tests.eval.clips import damaged_audio, damaged_video, struck

RATE, FPS = 16000, 16.0
Clip = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Clips of one and two sources that are all seen and heard."""
    found: list[Clip] = []
    seed = 60_000
    while len(found) < 24:
        scene = sample_scene(seed, sources=1 + seed % 2)
        seed += 1
        if all(source.audible and source.visible for source in scene.sources):
            found.append((render_video(scene), render_audio(scene)))
    return found


def score(video: np.ndarray, audio: np.ndarray) -> float:
    return sync_score(video, audio, FPS, RATE)


def together(video: np.ndarray, audio: np.ndarray) -> float:
    return float(lag_correlation(Evidence.of(video, audio, FPS, RATE), [0.0])[0])


def test_the_true_pairing_scores_above_shuffled_and_shifted_ones(clips: list[Clip]) -> None:
    true = [score(*clip) for clip in clips]
    assert all(0 < value <= 1 for value in true)
    correlations = [together(v, a) for v, a in clips]
    assert all(value <= (1 + max(0, r)) / 2 for value, r in zip(true, correlations, strict=True)), "F1 is at most 1"
    shuffled = [
        true[i] > score(video, clips[(i + turn) % len(clips)][1])
        for i, (video, _) in enumerate(clips)
        for turn in (1, 7)
    ]
    shifted = [
        true[i] > score(video, np.roll(audio, round(seconds * RATE)))
        for i, (video, audio) in enumerate(clips)
        for seconds in (-0.25, 0.1)
    ]
    assert np.mean(shuffled) >= 0.95 and np.mean(shifted) >= 0.95


def test_clips_as_a_small_model_makes_them(clips: list[Clip]) -> None:
    """Blurred and noisy pictures, sound through a log-mel: the order of right and wrong stays."""
    few = [(damaged_video(video), damaged_audio(audio)) for video, audio in clips[:6]]
    right = [
        score(*clip) > max(score(clip[0], few[(i + 1) % 6][1]), score(clip[0], np.roll(clip[1], RATE // 5)))
        for i, clip in enumerate(few)
    ]
    assert sum(right) >= 5


def test_events_further_apart_than_50_ms_are_no_pair() -> None:
    """Events of one knocking ball are at least 250 ms apart, so its own sound 80 ms late has no partner at all."""
    scene = scene_from_prompt("a large red metal ball knocks on the left", 3)
    video, audio = render_video(scene), render_audio(scene)
    late = {ms: score(video, np.roll(audio, round(ms * RATE / 1000))) for ms in (0, 25, 80)}
    assert late[0] > late[25] > 0 == late[80]


def test_nothing_seen_or_nothing_heard_scores_0(clips: list[Clip]) -> None:
    video, audio = clips[0]
    assert score(np.full_like(video, 30), audio) == 0
    assert score(video, np.zeros_like(audio)) == 0
    assert score(np.full_like(video, 30), np.zeros_like(audio)) == 0
    assert score(video[:1], audio[:1000]) == 0


def test_a_sound_too_many_lowers_it(clips: list[Clip]) -> None:
    video, audio = clips[0]
    extra = np.clip(audio + struck([0.02], hz=370.0, tau=0.02) + struck([1.8], hz=370.0, tau=0.02), -1, 1)
    assert score(video, extra) < score(video, audio)


def test_correlation_in_closed_form() -> None:
    """A picture that brightens at once when it sounds correlates; one that does so later does not."""
    frames = np.zeros((32, 8, 8, 3), np.float32)
    frames[16:] = 1.0  # all motion is between frames 15 and 16, at 15.5 / 16 s
    for moment, low, high in ((15.5 / 16, 0.8, 1.0), (0.5, -0.2, 0.1)):
        value = together(frames, struck([moment]))
        assert low <= value <= high
    assert together(np.zeros_like(frames), struck([0.5])) == 0
    assert together(frames, np.zeros(32000)) == 0


def test_unreadable_input_is_refused(clips: list[Clip]) -> None:
    video, audio = clips[0]
    for bad in ((video[0], audio), (video, audio[None]), (video, np.full(100, np.nan))):
        with pytest.raises(ValueError, match="shape|NaN"):
            score(*bad)
