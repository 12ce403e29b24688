"""Figures of the points of ``javis eval steps``, their differences on the same prompts, and the bars set for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from javis.eval.frechet import Gaussian, frechet_distance
from javis.eval.frechet_features import SETS, reference
from javis.eval.matching import match_events, total_counts
from javis.eval.stats import Jackknifed, Ratio, jackknife
from javis.eval.steps_points import MeasuredClip, Point
from javis.eval.sync import PRIMARY
from javis.eval.world_report import agreement, shuffled_agreement

TEACHER, STUDENT = "teacher", "student"
CAPTION = ("colour", "shape", "side", "timbre", "pitch")
KINDS = {"one_source": "one_source", "two_sources": "two_sources", "unseen": "off_screen", "silent": "silent"}


# --- figures of one point -----------------------------------------------------------------------------------------


def f1_of(clips: Sequence[MeasuredClip]) -> Ratio:
    """Event F1 at one frame of 16 fps, of all sources that are both seen and heard."""
    counts = [agreement(clip.measured) for clip in clips]
    return Ratio(np.array([2.0 * c.matched for c in counts]), np.array([float(c.reference + c.other) for c in counts]))


def offset_of(clips: Sequence[MeasuredClip]) -> Ratio:
    """Mean absolute offset of matched events, in ms."""
    offsets = [
        [
            1000.0 * abs(heard[j] - seen[i])
            for seen, heard in c.measured.sources
            for i, j in match_events(seen, heard, PRIMARY)
        ]
        for c in clips
    ]
    return Ratio(np.array([sum(o) for o in offsets], float), np.array([len(o) for o in offsets], float))


def accuracy_of(clips: Sequence[MeasuredClip], names: Sequence[str] = CAPTION) -> Ratio:
    """Share of the attributes that captions name and clips have."""
    rights = [[right for name in names for right in c.measured.checks.get(name, [])] for c in clips]
    return Ratio(np.array([sum(r) for r in rights], float), np.array([len(r) for r in rights], float))


def shuffled_f1(clips: Sequence[MeasuredClip]) -> float | None:
    """Event F1 of pictures with the sound of another clip of their kind."""
    counts = []
    for kind in KINDS:
        chosen = [c.measured for c in clips if c.measured.kind == kind and c.measured.sources]
        counts += [total_counts(derangement) for derangement in shuffled_agreement(chosen)]
    return total_counts(counts).f1


def frechet_of(clips: Sequence[MeasuredClip], name: str) -> Jackknifed | None:
    """Frechet distance to real clips on one set of features; None for too few clips, or of another form."""
    features, real = _features(clips, name), reference().gaussians[name]
    if features is None:
        return None
    return jackknife(len(features), lambda chosen: frechet_distance(real, Gaussian.of(features[chosen])))


def frechet_ratio(a: Sequence[MeasuredClip], b: Sequence[MeasuredClip], name: str) -> Jackknifed | None:
    """Distance of ``a`` over that of ``b`` (the same prompts); the jackknife is of its logarithm.

    ``corrected`` is what bars are set for: what few clips add to both distances would hide a part of the difference.
    """
    ours, others, real = _features(a, name), _features(b, name), reference().gaussians[name]
    if ours is None or others is None:
        return None

    def logarithm(chosen: np.ndarray) -> float:
        above, below = (frechet_distance(real, Gaussian.of(x[chosen])) for x in (ours, others))
        return float(np.log(max(above, 1e-12) / max(below, 1e-12)))

    return Jackknifed(*(float(np.exp(x)) for x in jackknife(len(ours), logarithm)))


def _features(clips: Sequence[MeasuredClip], name: str) -> np.ndarray | None:
    rows = [clip.features[name] for clip in clips if name in clip.features]
    # One clip is left out at a time, and a Gaussian needs more clips than dimensions.
    if len(rows) < len(clips) or not rows or len(rows) - 1 <= len(rows[0]):
        return None
    return np.stack(rows)


def row_of(point: Point, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of a point as plain json values.

    A figure is ``{"value", "low", "high"}`` with the 95 % bootstrap interval over clips, or None where it is undefined.
    A Frechet distance also has ``corrected``, without the bias of few clips, around which its jackknife interval lies.
    """
    clips = [point.clips[number] for number in sorted(point.clips)]
    seconds = [c.seconds for c in clips if c.seconds is not None]
    forwards = [c.forwards for c in clips if c.forwards is not None]
    kinds = {name: [c for c in clips if c.measured.kind == kind] for kind, name in KINDS.items()}
    return {
        "kind": "eval_steps",
        **facts,
        "variant": point.setting.variant,
        "steps": point.setting.steps,
        "options": dict(point.setting.options),
        "used": dict(point.used),
        "clips": {name: len(chosen) for name, chosen in kinds.items()},
        "f1": figure_of(f1_of(clips)),
        "f1_by_kind": {name: figure_of(f1_of(chosen)) for name, chosen in kinds.items() if name != "silent"},
        "shuffled_f1": _rounded(shuffled_f1(clips)),
        "mean_abs_offset_ms": figure_of(offset_of(clips), 2),
        "accuracy": figure_of(accuracy_of(clips)),
        "accuracy_of": {name: figure_of(accuracy_of(clips, [name])) for name in CAPTION},
        "silent_with_sound": _rounded(_mean([float(c.measured.onsets > 0) for c in kinds["silent"]])),
        "frechet": {name: _jackknifed(frechet_of(clips, name)) for name in SETS},
        "seconds_per_clip": _rounded(_mean(seconds)),
        "seconds_alone": point.seconds_alone,
        "forwards_per_clip": _rounded(_mean(forwards), 2),
        "batch_size": point.batch_size,
        **point.environment,
    }


def figure_of(ratio: Ratio, digits: int = 4) -> dict[str, float] | None:
    value, ends = ratio.value, ratio.interval()
    if value is None or ends is None:
        return None
    return dict(zip(("value", "low", "high"), (round(x, digits) for x in (value, *ends)), strict=True))


def _jackknifed(found: Jackknifed | None) -> dict[str, float] | None:
    return None if found is None else {name: round(float(x), 4) for name, x in found._asdict().items()}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


# --- differences and bars -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A bound on a figure or on the difference of two points.

    ``held`` is the verdict on the figure itself; ``surely`` on the whole of its 95 % interval.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    bound: float
    at_least: bool

    @property
    def held(self) -> bool | None:
        return None if self.value is None else self._inside(self.value)

    @property
    def surely(self) -> bool | None:
        end = self.low if self.at_least else self.high
        return None if end is None else self._inside(end)

    def _inside(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def row(self) -> dict[str, Any]:
        """Plain json values."""
        ends = {"low": _rounded(self.low), "high": _rounded(self.high)}
        limit = {"at_least": self.bound} if self.at_least else {"at_most": self.bound}
        return {
            "name": self.name,
            "value": _rounded(self.value),
            **ends,
            **limit,
            "held": self.held,
            "surely": self.surely,
        }

    def line(self) -> str:
        """``held  event F1, student 4 - teacher 30: -0.005 [-0.02, 0.01], at least -0.02``."""
        verdict = {True: "held  ", False: "MISSED", None: "?     "}[self.held]
        ends = "" if self.low is None or self.high is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        value = "not measured" if self.value is None else f"{self.value:+.3f}{ends}"
        doubt = "  (not sure)" if self.held and self.surely is False else ""
        return f"{verdict} {self.name}: {value}, {'at least' if self.at_least else 'at most'} {self.bound:g}{doubt}"


def compare(a: Point, b: Point, bounds: tuple[float, float, float, float]) -> list[Bar]:
    """Bars on ``a`` less ``b`` over the prompts that both have.

    Args:
        bounds: F1 and caption accuracy at least, offset (ms) and ratio of joint Frechet distances at most: (F1, offset,
            accuracy, ratio).
    """
    ours, others = _common(a, b)
    name = f"{a.setting.label} - {b.setting.label}"
    bars = [
        _bar(f"event F1, {name}", f1_of(ours).difference(f1_of(others)), bounds[0], True),
        _bar(f"mean |offset| in ms, {name}", offset_of(ours).difference(offset_of(others)), bounds[1], False),
        _bar(f"caption accuracy, {name}", accuracy_of(ours).difference(accuracy_of(others)), bounds[2], True),
    ]
    ratio = frechet_ratio(ours, others, "both")
    found = None if ratio is None else (ratio.corrected, ratio.low, ratio.high)
    return [*bars, _bar(f"joint Frechet distance, {name.replace(' - ', ' / ')}", found, bounds[3], False)]


def _bar(name: str, found: tuple[float, float, float] | None, bound: float, at_least: bool) -> Bar:
    value, low, high = found or (None, None, None)
    return Bar(name, value, low, high, bound, at_least)


def _common(a: Point, b: Point) -> tuple[list[MeasuredClip], list[MeasuredClip]]:
    numbers = sorted(set(a.clips) & set(b.clips))
    return [a.clips[n] for n in numbers], [b.clips[n] for n in numbers]


def bars(points: Iterable[Point]) -> list[Bar]:
    """The bars that these points can be held to: student against the teacher at 30 steps; the teacher with half of the
    forwards or fewer against itself; seconds of a clip from the student at 4 steps.

    The teacher at 30 steps is the one without further options; students, too. Of the cheaper teachers the one that
    holds with the fewest forwards is named, or if none holds the one with the highest F1.
    """
    points = list(points)
    usual = {(p.setting.variant, p.setting.steps): p for p in points if not p.setting.options}
    teacher = usual.get((TEACHER, 30))
    found: list[Bar] = []
    for steps, bounds in ((4, (-0.02, 5.0, -0.02, 1.15)), (8, (0.0, 0.0, 0.0, 1.0))):
        student = usual.get((STUDENT, steps))
        if student is not None and teacher is not None:
            found += compare(student, teacher, bounds)
    fast = usual.get((STUDENT, 4))
    if fast is not None and fast.seconds_alone is not None:
        found.append(Bar("seconds of one clip, student, 4 steps", fast.seconds_alone, None, None, 1.0, False))
    cheaper = _cheaper(teacher, points) if teacher is not None else []
    return [*found, *cheaper[:1]]


def _cheaper(teacher: Point, points: Sequence[Point]) -> list[Bar]:
    """Event F1 of teachers with at most half of the forwards, the best choice first."""
    whole = _mean([c.forwards for c in teacher.clips.values() if c.forwards is not None])
    choices: list[tuple[bool, float, int, Bar]] = []
    for point in points:
        cost = _mean([c.forwards for c in point.clips.values() if c.forwards is not None])
        if whole and cost and point.setting.variant == TEACHER and 2 * cost <= whole:
            ours, others = _common(point, teacher)
            name = f"event F1 with {whole / cost:.3g} times fewer forwards, {point.setting.label}"
            bar = _bar(name, f1_of(ours).difference(f1_of(others)), -0.01, True)
            if bar.value is not None:
                choices.append((not bar.held, cost if bar.held else -bar.value, len(choices), bar))
    return [bar for *_, bar in sorted(choices, key=lambda choice: choice[:3])]
