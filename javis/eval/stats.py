"""Confidence intervals over clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

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
