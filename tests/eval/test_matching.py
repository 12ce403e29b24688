"""The matcher against exhaustive search, and F1 against its closed form."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from javis.eval.matching import EventCounts, count_events, match_events, total_counts

times = st.lists(st.integers(0, 400).map(lambda ms: ms / 200), max_size=5, unique=True)
tolerances = st.sampled_from([0.0, 0.01, 0.0625, 0.1, 0.5])


def exhaustive(a: list[float], b: list[float], tolerance: float) -> tuple[int, float]:
    """Most pairs, then least sum of differences, over every one-to-one assignment."""
    best = (0, 0.0)
    for size in range(1, min(len(a), len(b)) + 1):
        for left in itertools.combinations(range(len(a)), size):
            for right in itertools.permutations(range(len(b)), size):
                gaps = [abs(a[i] - b[j]) for i, j in zip(left, right, strict=True)]
                if max(gaps) <= tolerance + 1e-9:
                    best = min(best, (-size, sum(gaps)))
    return -best[0], best[1]


@settings(max_examples=150, deadline=None)
@given(times, times, tolerances)
def test_is_optimal_one_to_one_and_within_tolerance(a: list[float], b: list[float], tolerance: float) -> None:
    pairs = match_events(a, b, tolerance)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert all(abs(a[i] - b[j]) <= tolerance + 1e-9 for i, j in pairs)
    most, least = exhaustive(a, b, tolerance)
    assert len(pairs) == most
    assert sum(abs(a[i] - b[j]) for i, j in pairs) == pytest.approx(least, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(times, times, tolerances)
def test_f1_is_symmetric_bounded_and_grows_with_tolerance(a: list[float], b: list[float], tolerance: float) -> None:
    one, other = count_events(a, b, tolerance), count_events(b, a, tolerance)
    assert one.f1 == other.f1
    assert one.f1 is None if not a and not b else 0.0 <= (one.f1 or 0.0) <= 1.0
    assert count_events(a, b, tolerance + 0.05).matched >= one.matched


@given(times.filter(bool), tolerances)
def test_identical_lists_score_one(a: list[float], tolerance: float) -> None:
    assert count_events(a, a[::-1], tolerance).f1 == 1.0


@given(times.filter(bool), st.integers(0, 5), st.integers(0, 4))
def test_dropped_and_extra_events_change_f1_as_in_closed_form(a: list[float], dropped: int, extra: int) -> None:
    kept = a[min(dropped, len(a)) :]
    found = kept + [10.0 + k for k in range(extra)]  # far from every reference
    expected = 2 * len(kept) / (len(a) + len(found))
    assert count_events(a, found, 0.0).f1 == pytest.approx(expected)


def test_one_event_between_two_takes_the_nearer_and_leaves_the_other() -> None:
    # Greedy in order of time would pair 1.00 with 1.05 and lose 1.08; the most pairs win over the nearest ones.
    assert match_events([1.0, 1.08], [1.05], 0.0625) == [(1, 0)]
    assert match_events([1.0, 1.06], [1.05, 1.11], 0.0625) == [(0, 0), (1, 1)]


def test_the_sum_weighs_events_not_clips() -> None:
    total = total_counts([EventCounts(4, 4, 4), EventCounts(0, 1, 1)])
    assert total.f1 == pytest.approx(0.8)
    assert total_counts([]).f1 is None


def test_a_difference_of_exactly_the_tolerance_counts() -> None:
    assert count_events([0.1], [0.1 + 0.0625], 0.0625).matched == 1
    assert count_events([0.1], [0.1 + 0.0626], 0.0625).matched == 0


def test_negative_or_undefined_tolerance_is_refused() -> None:
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="tolerance"):
            match_events([0.0], [0.0], bad)
