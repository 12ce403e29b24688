"""Confidence intervals over clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")


def bootstrap_interval(
    items: Sequence[Item],
    statistic: Callable[[Sequence[Item]], float | None],
    *,
    level: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap over whole clips (Efron and Tibshirani 1993, section 13.3).

    Events of one clip are not independent of each other, so clips, not events, are drawn with replacement.

    Args:
        items: one entry per clip.
        statistic: figure of a set of clips; a draw for which it is None (no event at all) is left out.
        level: coverage, between 0 and 1.
        draws: number of resamples, >= 1.
        seed: of the resampling; the same arguments give the same interval.

    Returns:
        Lower and upper end, or None if there are no clips or the statistic is never defined.
    """
    if not 0.0 < level < 1.0 or draws < 1:
        raise ValueError(f"level is {level} and draws is {draws}, expected 0 < level < 1 and draws >= 1")
    if not items:
        return None
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        value = statistic([items[index] for index in rng.integers(len(items), size=len(items))])
        if value is not None:
            values.append(value)
    if not values:
        return None
    tail = 50.0 * (1.0 - level)
    return float(np.percentile(values, tail)), float(np.percentile(values, 100.0 - tail))


@dataclass(frozen=True)
class Ratio:
    """A figure that is a sum over clips divided by another: an F1, an accuracy, a mean over all events.

    Attributes:
        numerator, denominator: one value per clip, float64 [N].
    """

    numerator: np.ndarray
    denominator: np.ndarray

    @property
    def value(self) -> float | None:
        """The figure of all clips; None if there is nothing to divide by."""
        total = float(self.denominator.sum())
        return float(self.numerator.sum()) / total if total else None

    def interval(self, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float] | None:
        """Percentile bootstrap over clips, as `bootstrap_interval`; None if the figure is never defined."""
        return _percentiles(self._drawn(_draws(len(self.numerator), draws, seed)), level)

    def difference(
        self, other: Ratio, *, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> tuple[float, float, float] | None:
        """This figure less that of ``other`` on the same clips, with its paired bootstrap interval: (value, low, high).

        Every draw takes the same clips of both, so that what is hard for both cancels (Efron and Tibshirani 1993,
        section 13.3, on the pairs). None where either figure is undefined.

        Raises:
            ValueError: the two are not of as many clips.
        """
        if len(self.numerator) != len(other.numerator):
            raise ValueError(f"{len(self.numerator)} clips and {len(other.numerator)}: expected the same ones")
        mine, others = self.value, other.value
        drawn = _draws(len(self.numerator), draws, seed)
        ends = _percentiles(self._drawn(drawn) - other._drawn(drawn), level)
        if mine is None or others is None or ends is None:
            return None
        return mine - others, *ends

    def _drawn(self, drawn: np.ndarray) -> np.ndarray:
        """The figure of each draw of clips [draws, N]; NaN where it is undefined."""
        above, below = self.numerator[drawn].sum(axis=1), self.denominator[drawn].sum(axis=1)
        return np.asarray(np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan))


def _draws(count: int, draws: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(max(1, count), size=(draws, count))


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float] | None:
    defined = values[np.isfinite(values)]
    if not len(defined):
        return None
    tail = 50.0 * (1.0 - level)
    return float(np.percentile(defined, tail)), float(np.percentile(defined, 100.0 - tail))


class Jackknifed(NamedTuple):
    """A statistic of N clips, the same without its bias of order 1/N, and the ends of its 95 % interval."""

    value: float
    corrected: float
    low: float
    high: float


def jackknife(count: int, statistic: Callable[[np.ndarray], float]) -> Jackknifed:
    """Delete-one jackknife (Efron and Tibshirani 1993, chapter 11), normal interval around the corrected value.

    For smooth statistics whose bias depends on the number of different clips, such as a Frechet distance: a bootstrap
    sample repeats clips, which adds a bias as large again.

    Args:
        count: number of clips, >= 2.
        statistic: figure of the clips whose indices [n] it is given.
    """
    if count < 2:
        raise ValueError(f"count is {count}, expected at least 2 clips")
    everything = np.arange(count)
    value = statistic(everything)
    left_out = np.array([statistic(np.delete(everything, i)) for i in range(count)])
    corrected = count * value - (count - 1) * float(left_out.mean())
    error = float(np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()))
    return Jackknifed(value, corrected, corrected - 1.96 * error, corrected + 1.96 * error)
