"""The arithmetic of the JavisBench metrics: closed forms, libraries, and the differences of the two protocols.

What the official code computes is replayed from recordings in tests/golden.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from javis.eval.fingerprint import fingerprint
from javis.eval.metrics import (
    audio_peaks,
    av_align,
    avh_score,
    class_grid,
    cosine_similarity_mean,
    desync,
    desync_scores,
    desync_segments,
    desync_windows,
    frechet_audio_distance,
    frechet_distance,
    javis_score,
    kernel_distance,
    onset_strength,
    segment_windows,
    video_peaks,
)

PROTOCOLS = ("corrected", "official")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- distances of sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_frechet_of_a_shift_and_a_scale_in_closed_form(protocol) -> None:
    x = rng().standard_normal((50, 6))
    assert frechet_distance(x, x + 3.0, protocol=protocol) == pytest.approx(6 * 9.0, rel=1e-5)
    # |m|^2 (1 - c)^2 + tr(C) (1 - c)^2 for c x
    mean, trace = x.mean(0), np.cov(x.T).trace()
    expected = (mean @ mean + trace) * 0.25
    assert frechet_distance(x, 0.5 * x, protocol=protocol) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(60, 8), (7, 20)])  # the second leaves covariances without full rank
def test_frechet_against_scipy(shape) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = rng(1).standard_normal(shape), rng(2).standard_normal(shape) @ np.diag(rng(3).uniform(0.5, 2, shape[1]))
    a, b = np.cov(x.T), np.cov(y.T)
    # tr((A B)^1/2) is the sum of the roots of the eigenvalues of A B, which are real and not negative.
    shared = np.sqrt(np.clip(linalg.eigvals(a @ b).real, 0, None)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * shared
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, y, protocol="official") == pytest.approx(expected, rel=1e-3)
    assert frechet_audio_distance(x, y) == pytest.approx(1e4 * expected, rel=1e-6)


def test_frechet_of_equal_sets_is_zero_and_never_less() -> None:
    x = rng().standard_normal((9, 24)) * 1e3
    assert 0.0 <= frechet_distance(x, x) < 1e-6 * np.cov(x.T).trace()


def test_kernel_distance_against_a_double_loop() -> None:
    x, y = rng(1).standard_normal((5, 3)), rng(2).standard_normal((4, 3)) + 1

    def k(u, v) -> float:
        return (float(u @ v) / 3 + 1) ** 3

    within = [
        sum(k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j) / (len(a) * (len(a) - 1))
        for a in (x, y)
    ]
    across = sum(k(u, v) for u in x for v in y) / 20
    assert kernel_distance(x, y) == pytest.approx(within[0] + within[1] - 2 * across, rel=1e-12)


def test_kernel_distance_sees_a_shift_which_the_official_one_does_not() -> None:
    x = rng().standard_normal((40, 5))
    assert kernel_distance(x, x + 2.0) > 1.0
    same = kernel_distance(x, x, protocol="official")
    assert kernel_distance(x, x + 2.0, protocol="official") == pytest.approx(same, abs=1e-9)


def test_distances_leave_their_arguments_alone() -> None:
    x, y = rng(1).standard_normal((8, 4)).astype(np.float32), rng(2).standard_normal((8, 4)).astype(np.float32)
    kept = x.copy(), y.copy()
    for protocol in PROTOCOLS:
        frechet_distance(x, y, protocol=protocol)
        kernel_distance(x, y, protocol=protocol)
    assert np.array_equal(x, kept[0]) and np.array_equal(y, kept[1])


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance])
def test_distances_refuse_what_they_cannot_compare(metric) -> None:
    good = rng().standard_normal((5, 4))
    with pytest.raises(ValueError, match="1 vectors, expected at least 2"):
        metric(good[:1], good)
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        metric(good, good[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        metric(good * np.nan, good)
    with pytest.raises(ValueError, match="expected one of corrected, official"):
        metric(good, good, protocol="paper")


# --- similarities -----------------------------------------------------------------------------------------------------


def test_cosines_in_closed_form() -> None:
    a = np.array([[1.0, 0.0], [0.0, 2.0]])
    b = np.array([[1.0, 1.0], [0.0, -3.0]])
    assert cosine_similarity_mean(a, b) == pytest.approx((math.sqrt(0.5) - 1.0) / 2)
    assert avh_score(a, np.array([1.0, 0.0])) == pytest.approx(0.5)
    assert avh_score(a, np.array([[1.0, 0.0]])) == pytest.approx(0.5)
    assert cosine_similarity_mean(np.zeros((1, 2)), b[:1]) == 0.0
    with pytest.raises(ValueError, match="equally many"):
        cosine_similarity_mean(np.ones((3, 2)), b)


def on_the_circle(cosines) -> np.ndarray:
    values = np.asarray(cosines, float)
    return np.stack([values, np.sqrt(1 - values**2)], axis=1)


AXIS = np.array([[1.0, 0.0]])


def test_javis_score_takes_the_worst_frames_of_each_window() -> None:
    first, second = on_the_circle([0.9, 0.1, 0.5, 0.3, 0.7]), on_the_circle([0.2, 0.8, 0.6, 0.4, 1.0])
    sound = np.repeat(AXIS, 2, axis=0)
    for protocol in PROTOCOLS:  # int(5 * 0.4) = 2
        assert javis_score([first, second], sound, protocol=protocol) == pytest.approx((0.2 + 0.3) / 2)
        assert javis_score([first, second], sound, topk_min=1, protocol=protocol) == pytest.approx((0.1 + 0.2) / 2)
        assert javis_score([first, second], sound, topk_min=1.0, protocol=protocol) == pytest.approx((0.5 + 0.6) / 2)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_javis_score_is_a_number_between_the_worst_cosine_and_the_mean(cosines, share) -> None:
    score = javis_score([on_the_circle(cosines)], AXIS, topk_min=share)
    assert min(cosines) - 1e-9 <= score <= np.mean(cosines) + 1e-9


def test_tiny_windows_give_nan_officially_and_their_worst_frame_here() -> None:
    two = on_the_circle([0.3, 0.6])
    assert math.isnan(javis_score([two], AXIS, protocol="official"))
    assert javis_score([two], AXIS) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="fails there as well"):
        javis_score([two], AXIS, topk_min=3, protocol="official")
    assert javis_score([two], AXIS, topk_min=3) == pytest.approx(0.45)


def test_javis_score_refuses() -> None:
    two = on_the_circle([0.3, 0.6])
    for share in (0.0, 1.5, 0, -1):
        with pytest.raises(ValueError, match="topk_min"):
            javis_score([two], AXIS, topk_min=share)
    with pytest.raises(ValueError, match="1 video and 2 audio windows"):
        javis_score([two], np.ones((2, 2)))


# --- windows ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 300),
    st.integers(1, 200_000),
    st.sampled_from([8.0, 16.0, 23.976, 24.0, 25.0, 29.97, 30.0]),
    st.sampled_from([(0.5, 0.0), (2.0, 1.5), (1.0, 0.25)]),
)
@settings(max_examples=150, deadline=None)
def test_windows_show_what_they_sound(n_frames, n_samples, fps, size) -> None:
    seconds, overlap = size
    found = segment_windows(n_frames, n_samples, fps, seconds=seconds, overlap=overlap)
    assert len(found.video) == len(found.audio) >= 1
    assert all(0 <= a < b <= n_frames for a, b in found.video) and all(0 <= a < b <= n_samples for a, b in found.audio)
    if len(found.video) > 1:
        for (v0, v1), (a0, a1) in zip(*found, strict=True):
            assert abs(v0 / fps - a0 / 16000) <= 0.51 / fps + 1e-4
            assert abs((v1 - v0) / fps - (a1 - a0) / 16000) <= 0.51 / fps + 1e-4
        # What both streams cover is covered, but for what rounding a time to a frame leaves.
        assert found.video[-1][1] / fps >= min(n_frames / fps, n_samples / 16000) - 1.01 / fps


def test_official_windows_drift_apart_and_ours_do_not() -> None:
    options = {"seconds": 0.5, "overlap": 0.0}
    official = segment_windows(240, 160160, 23.976, protocol="official", **options)
    gaps = [abs(v / 23.976 - a / 16000) for (v, _), (a, _) in zip(*official, strict=True)]
    assert max(gaps) > 0.3
    ours = segment_windows(240, 160160, 23.976, **options)
    assert max(abs(v / 23.976 - a / 16000) for (v, _), (a, _) in zip(*ours, strict=True)) < 0.022


def test_windows_agree_where_frames_divide_the_window() -> None:
    for n_frames, n_samples in ((96, 64000), (51, 34000), (49, 32000), (12, 8000)):
        corrected, official = (
            segment_windows(n_frames, n_samples, 24, seconds=0.5, overlap=0, protocol=p) for p in PROTOCOLS
        )
        assert corrected == official


def test_windows_refuse() -> None:
    with pytest.raises(ValueError, match="0 frames"):
        segment_windows(0, 100, 24)
    with pytest.raises(ValueError, match="less than a frame"):
        segment_windows(48, 32000, 24, seconds=0.5, overlap=0.5)
    with pytest.raises(ValueError, match="less than a frame"):
        segment_windows(48, 32000, 24, seconds=0.01, overlap=0.0)
    with pytest.raises(ValueError, match="fps is 0"):
        segment_windows(48, 32000, 0)


def test_desync_windows() -> None:
    assert desync_windows(3, 4) == [[0, 1, 2, 0]]
    assert desync_windows(8, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert desync_windows(9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [5, 6, 7, 8]]
    assert [len(w) for w in desync_windows(2)] == [14]
    assert desync_segments(15, 10240) == 0
    with pytest.raises(ValueError, match="0 segments"):
        desync_windows(0)


# --- peaks ------------------------------------------------------------------------------------------------------------


def test_video_peaks_are_strict() -> None:
    assert video_peaks(np.array([0, 1, 0, 2, 2, 0, 3, 1.0]), 4.0) == [0.25, 1.5]
    assert video_peaks(np.array([0, 1, 0.0])) == [1.0]
    assert video_peaks(np.array([5.0])) == [] and video_peaks(np.array([])) == []


times = st.lists(st.integers(0, 400).map(lambda i: i / 100), max_size=8)


@given(times, times, st.sampled_from([8.0, 16.0, 24.0]))
@settings(max_examples=150, deadline=None)
def test_av_align_is_an_intersection_over_union(video, audio, fps) -> None:
    value = av_align(video, audio, fps)
    assert 0.0 <= value <= 1.0
    assert value == av_align(audio, video, fps)  # the official one is not symmetric
    distinct = sorted(set(video))
    if distinct:
        assert av_align(distinct, distinct, fps) == 1.0
    pairs = [(i, j) for i, a in enumerate(video) for j, b in enumerate(audio) if abs(a - b) < 1 / fps - 1e-9]
    most = largest_matching(pairs)
    total = len(video) + len(audio)
    assert value == pytest.approx(most / (total - most) if total else 0.0)


def largest_matching(pairs) -> int:
    """By augmenting paths (Kuhn)."""
    partner: dict[int, int] = {}

    def augment(i, seen) -> bool:
        for a, j in pairs:
            if a == i and j not in seen:
                seen.add(j)
                if j not in partner or augment(partner[j], seen):
                    partner[j] = i
                    return True
        return False

    return sum(augment(i, set()) for i in sorted({i for i, _ in pairs}))


def test_official_av_align_exceeds_one() -> None:
    onsets, motion = [1.0, 1.01, 1.02], [1.0]
    assert av_align(motion, onsets, 24.0, protocol="official") > 2.9
    assert av_align(motion, onsets, 24.0) == pytest.approx(1 / 3)
    assert av_align([], [], 24.0) == 0.0


def test_a_frame_apart_is_not_aligned() -> None:
    for protocol in PROTOCOLS:
        assert av_align([0.5], [0.75], 4.0, protocol=protocol) == 0.0
        assert av_align([0.5], [0.7499], 4.0, protocol=protocol) == pytest.approx(1.0, abs=1e-5)


# --- onsets -----------------------------------------------------------------------------------------------------------


def clicks(at, rate=16000, seconds=2.0) -> np.ndarray:
    wave = np.zeros(int(rate * seconds), np.float32)
    time = np.arange(rate // 2) / rate
    decay = np.exp(-time / 0.03) * np.sin(2 * np.pi * 880 * time)
    for start in (int(t * rate) for t in at):
        wave[start : start + len(decay)] += decay[: len(wave) - start]
    return wave


@pytest.mark.parametrize("rate", [16000, 22050, 44100])
def test_onsets_of_clicks(rate) -> None:
    at = np.array([0.31, 0.74, 1.2, 1.63])
    found = np.array(audio_peaks(clicks(at, rate), rate))
    # The grid has hops of 512 samples, and a click shows up as soon as a transform of 2048 samples reaches it. A second
    # peak of the same click is possible where 30 ms are less than a hop.
    late = found[:, None] - at
    near = (late >= -1024 / rate) & (late <= 1536 / rate)
    assert near.any(axis=0).all() and near.any(axis=1).all(), found


def test_a_sound_without_onsets_has_none() -> None:
    assert audio_peaks(np.zeros(16000), 16000) == []
    assert onset_strength(np.zeros(16000), 16000).max() == 0.0
    assert audio_peaks(np.full(3, 0.5), 16000) == []
    with pytest.raises(ValueError, match="empty"):
        audio_peaks(np.zeros(0), 16000)
    with pytest.raises(ValueError, match="empty"):
        audio_peaks(np.ones(100), 16000, max_seconds=1e-6)


def test_onsets_against_librosa() -> None:
    librosa = pytest.importorskip("librosa")
    generator = rng(5)
    for number in range(12):
        rate = (8000, 16000, 22050, 44100)[number % 4]
        wave = clicks(np.sort(generator.uniform(0.05, 1.9, number)), rate)
        wave += (generator.standard_normal(len(wave)) * 10 ** generator.uniform(-4, -1)).astype(np.float32)
        envelope = librosa.onset.onset_strength(y=wave, sr=rate)
        np.testing.assert_allclose(onset_strength(wave, rate), envelope, atol=2e-3)
        frames = librosa.onset.onset_detect(onset_envelope=envelope, sr=rate)
        assert audio_peaks(wave, rate) == pytest.approx(librosa.frames_to_time(frames, sr=rate).tolist(), abs=1e-9)


# --- DeSync -----------------------------------------------------------------------------------------------------------


def test_desync_in_closed_form() -> None:
    grid = class_grid()
    np.testing.assert_allclose(grid, [float(Fraction(k, 5)) for k in range(-10, 11)], atol=1e-12)
    logits = np.zeros((2, 2, 21))
    logits[0, 0, 0] = logits[0, 1, 10] = logits[1, 0, 11] = logits[1, 1, 20] = 1.0  # -2.0, 0.0 and 0.2, 2.0
    np.testing.assert_allclose(desync_scores(logits), [1.1, 1.0])
    np.testing.assert_allclose(desync_scores(logits, protocol="official"), [1.0, 1.1])  # mixed; the same mean
    assert desync(logits[:, 0]) == pytest.approx(1.1)
    with pytest.raises(ValueError, match="grid"):
        desync_scores(logits[..., :20])
    with pytest.raises(ValueError, match="windows, classes"):
        desync(logits)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_apart_what_may_not_be_compared() -> None:
    facts = {"protocol": "corrected", "fps": 24.0, "size": (64, 64), "extractors": {"clip": "abc"}, "n": np.int64(3)}
    one = fingerprint(**facts)
    assert one == fingerprint(**dict(reversed(facts.items())))
    assert one == fingerprint(**{**facts, "fps": 24, "size": np.array([64, 64])}, seconds=None)
    for change in ({"fps": 23.976}, {"protocol": "official"}, {"n": 4}, {"extractors": {"clip": "abd"}}):
        assert fingerprint(**{**facts, **change})["id"] != one["id"]
    assert json.loads(json.dumps(one)) == one
    for bad in ({"id": "x"}, {"fps": math.nan}, {"clip": object()}):
        with pytest.raises(ValueError, match="id|finite|expected"):
            fingerprint(**bad)
