"""Damage to clips: what each kind does, in closed form, and that it does nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from javis.eval.damage import DAMAGES, MAX_SHIFT, NoDamage, shift_sound
from javis.eval.onsets import audio_onsets
from tests.eval.clips import disc, struck

RATE, FPS = 16000, 16.0
TIMES = [0.3, 0.8, 1.4]


@pytest.fixture(scope="module")
def clip() -> tuple[np.ndarray, np.ndarray]:
    """A disc that hops to and fro, and a sound at each of ``TIMES``."""
    t = np.arange(32) / FPS
    return disc(0.5 + 0.2 * np.sin(5 * t), 0.5 + 0.0 * t), struck(TIMES, tau=0.03)


@pytest.fixture(scope="module")
def other() -> tuple[np.ndarray, np.ndarray]:
    t = np.arange(20) / FPS
    return disc(0.3 + 0.0 * t, 0.2 + 0.3 * t), struck([0.55], hz=1500.0, seconds=1.2)


def damage(name: str, clip, level: float, seed: int = 0, events=TIMES, other=None):
    return DAMAGES[name](*clip, FPS, RATE, np.random.default_rng(seed), level, events=events, other=other)


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_one_stream_changes_and_keeps_its_form(name: str, level: float, clip, other) -> None:
    before = [stream.copy() for stream in clip]
    streams = damage(name, clip, level, other=other)
    changed, kept = (0, 1) if name.startswith("video") else (1, 0)
    assert streams[kept] is clip[kept]
    assert streams[changed].shape == clip[changed].shape and streams[changed].dtype == clip[changed].dtype
    assert not np.array_equal(streams[changed], clip[changed]), "level is too low to do anything"
    assert np.isfinite(streams[changed]).all() and np.abs(streams[1]).max() <= 1
    for stream, copy in zip(clip, before, strict=True):
        np.testing.assert_array_equal(stream, copy, err_msg="the given clip was changed")
    again = damage(name, clip, level, other=other)
    np.testing.assert_array_equal(again[changed], streams[changed], err_msg="same generator, same damage")


def test_a_shift_moves_every_sample(clip) -> None:
    sound = clip[1]
    for seed in range(4):  # both signs
        moved = damage("audio_shift", clip, 0.2, seed)[1]
        late = round(0.2 * MAX_SHIFT * RATE)
        if np.flatnonzero(moved)[0] > 0.3 * RATE:
            np.testing.assert_array_equal(moved[late:], sound[:-late])
        else:
            np.testing.assert_allclose(moved[100:-late], sound[late + 100 :])  # the first 4 ms are faded in
            assert np.abs(moved[-late:]).max() == 0
    np.testing.assert_array_equal(shift_sound(sound, 0.0, RATE), sound)


def test_drop_extra_and_jitter_by_the_onsets_that_are_left(clip) -> None:
    def onsets(name: str, level: float, seed: int = 0) -> list[float]:
        return [event.time for event in audio_onsets(damage(name, clip, level, seed)[1], RATE)]

    assert [len(onsets("audio_drop", level)) for level in (0.1, 0.67, 1.0)] == [2, 1, 0]
    assert [len(onsets("audio_extra", level)) for level in (0.1, 0.5)] == [4, 5]
    for time in onsets("audio_extra", 0.5):
        apart = np.abs(np.array(TIMES) - time).min()
        assert apart < 0.02 or apart > 0.13
    found = onsets("audio_jitter", 0.3)
    np.testing.assert_allclose(np.abs(np.array(found) - TIMES), 0.09, atol=0.012)


def test_swaps_take_that_share_of_the_other_clip(clip, other) -> None:
    video, sound = damage("video_swap", clip, 0.25, other=other)[0], damage("audio_swap", clip, 0.25, other=other)[1]
    np.testing.assert_array_equal(video[:24], clip[0][:24])
    np.testing.assert_array_equal(video[24:], np.repeat(other[0][-1:], 8, axis=0))  # the shorter clip's last frame
    np.testing.assert_array_equal(sound[:24000], clip[1][:24000])
    assert np.abs(sound[24000:]).max() == 0  # it is over by then
    np.testing.assert_array_equal(
        damage("audio_swap", clip, 1.0, other=other)[1][: len(other[1])][100:], other[1][100:]
    )


def test_speed_moves_events_in_proportion(clip) -> None:
    for level, seed in ((1.0, 0), (1.0, 1), (0.25, 0), (0.25, 1)):
        found = [event.time for event in audio_onsets(damage("audio_speed", clip, level, seed)[1], RATE)]
        factors = [2.0**level, 2.0**-level]
        fits = [np.abs(np.array(TIMES)[: len(found)] / f - found).max() for f in factors]
        assert min(fits) < 0.015
    fast = next(c for c in (damage("video_speed", clip, 1.0, seed)[0] for seed in range(20)) if (c[20] == c[31]).all())
    np.testing.assert_array_equal(fast, clip[0][np.minimum(2 * np.arange(32), 31)])


def test_stall_freeze_and_judder_hold_frames(clip) -> None:
    stalled = damage("video_stall", clip, 0.5)[0]
    held = [k for k in range(29) if all(np.array_equal(stalled[k], stalled[k + j]) for j in range(1, 4))]
    at = held[0]
    np.testing.assert_array_equal(stalled[:at], clip[0][:at])
    np.testing.assert_array_equal(stalled[at + 4 :], clip[0][at:-4])  # 0.25 s are 4 frames
    assert len(np.unique(damage("video_freeze", clip, 1.0)[0], axis=0)) == 1
    juddering = damage("video_judder", clip, 0.4)[0]
    np.testing.assert_array_equal(juddering, clip[0][[k // 4 * 4 for k in range(32)]])


def test_noise_has_the_stated_level(clip) -> None:
    for level, decibel in ((0.25, 20.0), (0.75, 0.0)):
        noisy = damage("audio_noise", clip, level)[1].astype(float)
        sound = clip[1].astype(float)
        gain = (noisy @ sound) / (sound @ sound)  # below 1 if the mix would have clipped
        ratio = np.mean((gain * sound) ** 2) / np.mean((noisy - gain * sound) ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(decibel, abs=0.4)
    grey = (np.full((32, 64, 64, 3), 128, np.uint8), clip[1])
    assert damage("video_noise", grey, 0.2)[0].std() == pytest.approx(20.0, rel=0.02)


def test_mute_and_mask_hide_that_share(clip) -> None:
    assert np.abs(damage("audio_mute", clip, 1.0)[1]).max() == 0
    for seed in range(5):
        silent = damage("audio_mute", clip, 0.3, seed)[1]
        assert any(np.abs(silent[round(t * RATE) : round((t + 0.03) * RATE)]).max() == 0 for t in TIMES)
    black = damage("video_mask", clip, 0.5)[0]
    assert (black[0].max(axis=-1) == 0).mean() == pytest.approx(14 / 36, abs=0.05)
    assert np.abs(np.diff(black.astype(int), axis=0)).max() == 0, "what moves is hidden first"


def test_blur_keeps_the_mean_and_takes_the_edges(clip) -> None:
    soft = damage("video_blur", clip, 0.5)[0]
    assert soft.mean() == pytest.approx(clip[0].mean(), abs=0.3)
    assert np.abs(np.diff(soft.astype(int), axis=1)).max() < 0.5 * np.abs(np.diff(clip[0].astype(int), axis=1)).max()


@pytest.mark.parametrize("name", ["audio_drop", "audio_jitter", "audio_extra", "audio_mute", "video_stall"])
def test_without_events_there_is_nothing_to_damage(name: str, clip) -> None:
    silent = (clip[0], np.zeros(32000, np.float32))
    with pytest.raises(NoDamage):
        damage(name, silent, 0.5, events=None)  # none is heard either
    with pytest.raises(NoDamage):
        damage("audio_noise", silent, 0.5)
    with pytest.raises(NoDamage, match="another clip"):
        damage("audio_swap", clip, 0.5)


@pytest.mark.parametrize("level", [0.0, -1.0, 1.5, float("nan")])
def test_a_level_that_is_none_is_refused(level: float, clip) -> None:
    with pytest.raises(ValueError, match="level"):
        damage("audio_shift", clip, level)
