"""One-to-one matching of event times on a line, and the F1 that follows from it.

Read next: sync.py (the report of one clip), world_report.py (the figures of a set of clips).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Two times that differ by the tolerance exactly must match whatever the last bit of their difference is.
_EPS = 1e-9


def match_events(reference: Sequence[float], other: Sequence[float], tolerance: float) -> list[tuple[int, int]]:
    """Match two lists of event times one to one.

    Of all one-to-one matchings whose pairs differ by at most ``tolerance`` seconds this is one with the most pairs and,
    among those, with the smallest sum of absolute differences. On a line a non-crossing matching attains both, so a
    dynamic program over the sorted times is exact (no greedy choice that a third event can spoil).

    Args:
        reference: times in seconds, any order.
        other: times in seconds, any order.
        tolerance: largest allowed difference in seconds, >= 0; a difference of exactly ``tolerance`` counts.

    Returns:
        Index pairs ``(i, j)`` into the two lists, ordered by ``reference[i]``.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}, expected a number >= 0 in seconds")
    order_a, order_b = np.argsort(reference, kind="stable"), np.argsort(other, kind="stable")
    a, b = np.asarray(reference, float)[order_a], np.asarray(other, float)[order_b]
    n, m = len(a), len(b)
    # best[i][j] = (-pairs, sum of |difference|) over the first i and j events; tuples compare in the wanted order.
    best = [[(0, 0.0)] * (m + 1) for _ in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            choice = min(best[i - 1][j], best[i][j - 1])
            gap = abs(a[i - 1] - b[j - 1])
            if gap <= tolerance + _EPS:
                pairs, cost = best[i - 1][j - 1]
                choice = min(choice, (pairs - 1, cost + gap))
            best[i][j] = choice
    pairs_found, i, j = [], n, m
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs_found.append((int(order_a[i]), int(order_b[j])))
    return pairs_found[::-1]


@dataclass(frozen=True)
class EventCounts:
    """Matched pairs and the number of events on either side; adds up over clips."""

    matched: int = 0
    reference: int = 0
    other: int = 0

    def __add__(self, more: EventCounts) -> EventCounts:
        return EventCounts(self.matched + more.matched, self.reference + more.reference, self.other + more.other)

    @property
    def f1(self) -> float | None:
        """``2 matched / (reference + other)``, the harmonic mean of precision and recall; None without any event."""
        total = self.reference + self.other
        return 2.0 * self.matched / total if total else None


def count_events(reference: Sequence[float], other: Sequence[float], tolerance: float) -> EventCounts:
    """Counts of ``match_events`` for one pair of lists."""
    return EventCounts(len(match_events(reference, other, tolerance)), len(reference), len(other))


def total_counts(counts: Iterable[EventCounts]) -> EventCounts:
    """Sum over clips: the F1 of the sum weighs every event, not every clip, alike."""
    total = EventCounts()
    for one in counts:
        total = total + one
    return total
