"""Figures, intervals, controls and distances against closed forms."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from javis.eval.javisbench.figures import derangements, distance_figure, score_clips
from javis.eval.javisbench.metrics import BY_NAME, cosine, event_f1, javis, offset
from javis.eval.javisbench.store import Measured
from javis.eval.metrics import frechet_distance


def clips(values: list[float | None]):
    return [{"part": Measured({"x": value})} for value in values]


def product(clip, other):
    a, b = clip["part"].facts["x"], other["part"].facts["x"]
    return None if a is None or b is None else (a * b, 1.0)


def test_mean_and_its_interval() -> None:
    """The mean, and for a known spread the half width of the interval: 1.96 sigma / sqrt(n), within a tenth."""
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 2.0, 400).tolist()
    figure = score_clips(clips(values), lambda c, _: (c["part"].facts["x"], 1.0)).figure(np.arange(400))
    assert figure["value"] == pytest.approx(np.mean(values), rel=1e-5) and figure["n"] == 400
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert (figure["high"] - figure["low"]) / 2 == pytest.approx(half, rel=0.1)


def test_shuffled_takes_every_other_clip_once() -> None:
    """Of n clips eight derangements; with 3 there are two, and their mean is that of all pairs i != j."""
    figure = score_clips(clips([1.0, 2.0, 4.0]), product).figure(np.arange(3))
    assert figure["value"] == pytest.approx((1 + 4 + 16) / 3, rel=1e-5)
    assert figure["shuffled"] == pytest.approx((1 * 2 + 1 * 4 + 2 * 4) / 3, rel=1e-5)
    assert figure["low"] is None  # of 3 clips an interval says nothing
    for count in (2, 5, 40):
        for order in derangements(count):
            assert sorted(order) == list(range(count)) and not (order == np.arange(count)).any()
    assert derangements(1) == [] and derangements(0) == []


def test_undefined_clips_are_left_out_and_counted() -> None:
    scores = score_clips(
        clips([1.0, None, float("nan"), 3.0]),
        lambda c, _: None if c["part"].facts["x"] is None else (c["part"].facts["x"], 1.0),
    )
    assert scores.defined.tolist() == [True, False, False, True]
    assert scores.figure(np.arange(4))["value"] == 2.0 and scores.figure(np.arange(4))["n"] == 2
    assert scores.figure(np.array([1, 2]))["value"] is None


def test_a_category_has_the_control_of_its_clips() -> None:
    scores = score_clips(clips([1.0, 2.0, 4.0]), product)
    assert scores.figure(np.array([2]))["shuffled"] == pytest.approx((4 * 1 + 4 * 2) / 2, rel=1e-5)


def test_distance_of_a_shift() -> None:
    """Gaussians of one covariance that differ by a shift d: distance |d|^2; the interval is of the corrected one."""
    rng = np.random.default_rng(1)
    real = rng.normal(size=(4000, 4))
    mine = rng.normal(size=(600, 4)) + 2.0
    figure = distance_figure(mine, lambda some: frechet_distance(some, real))
    assert figure["value"] == pytest.approx(16.0, rel=0.05) and not figure["rank_deficient"]
    assert figure["low"] < figure["corrected"] < figure["high"] and figure["low"] < 16.0 < figure["high"]
    assert figure["corrected"] < figure["value"]  # few clips are too far away
    small = distance_figure(mine[:4], lambda some: frechet_distance(some, real))
    assert small["rank_deficient"] and small["low"] is None and small["value"] is not None
    assert distance_figure(mine[:1], lambda some: 1 / 0)["value"] is None


def parts(name: str, facts=None, **arrays):
    return {name: Measured(facts or {}, {key: np.asarray(value) for key, value in arrays.items()})}


def test_cosines_of_vectors_and_rows() -> None:
    rng = np.random.default_rng(2)
    frames, text, rows = rng.normal(size=(5, 8)), rng.normal(size=8), rng.normal(size=(7, 8))

    def cos(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    a = parts("clip", frames=frames, text=text)
    assert cosine("clip", "frames", "text", a, a, "corrected")[0] == pytest.approx(
        np.mean([cos(f, text) for f in frames])
    )
    b = parts("cavp", video=frames, audio=rows)
    expected = np.mean([cos(f, r) for f, r in zip(frames, rows[:5], strict=True)])
    assert cosine("cavp", "video", "audio", b, b, "corrected")[0] == pytest.approx(expected)
    assert cosine("clip", "frames", "text", a, {}, "corrected") is None
    assert cosine("clip", "frames", "text", parts("clip", frames=frames * np.nan, text=text), a, "corrected") is None


def test_javis_score_of_clips_of_different_length() -> None:
    """The mean over common windows of the mean of the two smallest of five cosines (0.4 of a window)."""
    rng = np.random.default_rng(3)
    frames, sounds = rng.normal(size=(9, 6)), rng.normal(size=(2, 6))
    windows = np.array([[0, 5], [2, 7], [4, 9]])
    a = parts("imagebind", frames=frames, video_windows=windows)
    b = parts("imagebind", audio_windows=sounds)
    unit = frames / np.linalg.norm(frames, axis=1, keepdims=True)
    heard = sounds / np.linalg.norm(sounds, axis=1, keepdims=True)
    expected = np.mean([np.sort(unit[s:e] @ h)[:2].mean() for (s, e), h in zip(windows[:2], heard, strict=True)])
    assert javis(a, b, "corrected")[0] == pytest.approx(expected)


def sync(sources, by_source=True):
    return parts("sync", {"sources": sources, "by_source": by_source})


def test_event_f1_counts_by_source() -> None:
    clip = sync([[[0.5, 1.0], [0.51, 1.2]], [[], []]])
    f1 = partial(event_f1, 0.0625)
    assert f1(clip, clip, "corrected") == (2.0, 4.0 + 2.0)  # one pair of 2 + 2 events; a described source without any
    assert f1(sync([[[], []]], by_source=False), sync([[[], []]], by_source=False), "corrected") is None
    assert f1(sync([]), sync([]), "corrected") is None  # nothing is both seen and heard
    assert offset(clip, clip, "corrected") == (pytest.approx(10.0), 1.0)
    late = sync([[[], [0.9]]])
    assert f1(clip, late, "corrected") == (0.0, 3.0)  # the picture of one, the sound of the other


def test_every_metric_has_one_way_to_its_figure() -> None:
    for metric in BY_NAME.values():
        assert (metric.score is None) != (metric.distance is None), metric.name
        assert metric.distance is None or metric.kind in ("video", "audio"), metric.name
