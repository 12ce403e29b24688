"""Event times from pixels, against motions with a known closed form."""

from __future__ import annotations

import numpy as np
import pytest

from javis.eval.motion import video_events
from javis.world import WorldConfig, parse_prompt, render_video, scene_from_prompt
from tests.eval.clips import damaged_video, disc

RED = parse_prompt("a red ball bounces on the left")[0]


def hops(t: np.ndarray, contacts: list[float], gravity: float = 6.0, ground: float = 0.8) -> np.ndarray:
    """y of something that hops between the contact times (and along the same law before and after)."""
    ends = [2 * contacts[0] - contacts[1], *contacts, 2 * contacts[-1] - contacts[-2]]
    k = np.clip(np.searchsorted(ends, t, side="right") - 1, 0, len(ends) - 2)
    start, stop = np.array(ends)[k], np.array(ends)[k + 1]
    return ground - 0.5 * gravity * (t - start) * (stop - t)


def times_of(video: np.ndarray, fps: float, clause: object = RED) -> list[float]:
    return [event.time for event in video_events(video, fps, clause)]  # type: ignore[arg-type]


@pytest.mark.parametrize("fps", [12, 16, 24, 30])
@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
def test_hops_are_found_between_the_frames(fps: int, noisy: bool) -> None:
    rng = np.random.default_rng(fps)
    for trial in range(3):
        contacts = list(np.cumsum(rng.uniform(0.42, 0.6, 3)) + 0.05)
        t = np.arange(2 * fps) / fps
        video = disc(np.full_like(t, 0.3), hops(t, contacts))
        video = damaged_video(video, trial) if noisy else video
        found = times_of(video, fps)
        assert len(found) == 3
        np.testing.assert_allclose(found, contacts, atol=0.01)


def test_cutting_the_start_shifts_the_times() -> None:
    t = np.arange(32) / 16
    video = disc(np.full_like(t, 0.3), hops(t, [0.72, 1.2, 1.64]))
    shift = 5 / 16
    np.testing.assert_allclose(np.array(times_of(video[5:], 16)) + shift, times_of(video, 16), atol=0.004)


def test_a_smooth_turn_is_no_contact() -> None:
    t = np.arange(32) / 16
    for period in (1.3, 1.8, 2.4):
        video = disc(0.3 + 0.01 * np.sin(3 * t), 0.5 + 0.17 * np.sin(2 * np.pi * t / period))
        assert times_of(video, 16, None) == []
        assert times_of(video, 16) == []


@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
def test_nothing_happens_in_a_still_clip(noisy: bool) -> None:
    still = disc(np.full(32, 0.3), np.full(32, 0.6))
    still = damaged_video(still) if noisy else still
    for clause in (None, RED, {**RED, "motion": "swings"}, {**RED, "motion": "knocks"}, {**RED, "motion": "flashes"}):
        assert times_of(still, 16, clause) == []


def test_an_empty_clip_has_no_object() -> None:
    assert times_of(np.full((32, 64, 64, 3), 30, np.uint8), 16, None) == []
    assert times_of(np.full((32, 64, 64, 3), 30, np.uint8), 16) == []


def test_a_flash_is_timed_by_its_fading() -> None:
    # A lamp of the world's law, drawn here: dim, then full and a share of white, fading with 0.12 s.
    base, lit_at = np.array([52.0, 104.0, 244.0]), [0.412, 1.201]
    t = np.arange(32) / 16
    last = np.where(t >= lit_at[1], lit_at[1], lit_at[0])
    glow = np.where(t >= lit_at[0], np.exp(-(t - last) / 0.12), 0.0)[:, None]
    ink = base * (0.45 + 0.55 * glow) + 0.3 * glow * (255 - base)
    cover = disc(np.full(32, 0.5), np.full(32, 0.4), colour=(255, 255, 255)).astype(float).mean(axis=-1, keepdims=True)
    cover = (cover - 32) / (255 - 32)
    video = np.round(30 + cover * (ink[:, None, None] - 30)).astype(np.uint8)
    clause = parse_prompt("a blue ball flashes in the middle")[0]
    np.testing.assert_allclose(times_of(video, 16, clause), lit_at, atol=0.006)
    np.testing.assert_allclose(times_of(video, 16, None), lit_at, atol=0.006)


@pytest.mark.parametrize("motion", ["bounces", "swings", "knocks", "flashes"])
@pytest.mark.parametrize("damage", [False, True], ids=["clean", "damaged"])
def test_the_worlds_events_are_seen(motion: str, damage: bool) -> None:
    errors = []
    for seed, colour in enumerate(["red", "white", "purple", "green"]):
        prompt = f"a {colour} ball {motion} on the right"
        scene = scene_from_prompt(prompt, seed)
        video = damaged_video(render_video(scene), seed) if damage else render_video(scene)
        for clause in (parse_prompt(prompt)[0], None):
            found = times_of(video, 16, clause)
            truth = [event.time for event in scene.sources[0].events]
            assert len(found) == len(truth), (prompt, seed, found, truth)
            errors += list(np.abs(np.array(found) - truth))
    assert np.mean(errors) < 0.006
    assert np.max(errors) < 0.035


def test_large_frames_are_read_like_small_ones() -> None:
    scene = scene_from_prompt("a small yellow star bounces in the middle", 3, WorldConfig(size=256, fps=24))
    truth = [event.time for event in scene.sources[0].events]
    np.testing.assert_allclose(times_of(render_video(scene), 24, None), truth, atol=0.012)


def test_what_is_unseen_or_silent_shows_no_events() -> None:
    t = np.arange(32) / 16
    video = disc(np.full_like(t, 0.3), hops(t, [0.72, 1.2, 1.64]))
    assert times_of(video, 16, parse_prompt("an unseen bell rings")[0]) == []
    assert times_of(video, 16, parse_prompt("a red ball floats silently on the left")[0]) == []


def test_unusable_video_is_refused() -> None:
    for bad, message in ((np.zeros((4, 8, 8)), "shape"), (np.zeros((4, 8, 8, 3), np.int32), "dtype")):
        with pytest.raises(ValueError, match=message):
            video_events(bad, 16)
    with pytest.raises(ValueError, match="fps"):
        video_events(np.zeros((4, 8, 8, 3), np.uint8), 0)
