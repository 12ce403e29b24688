"""Figures of a set of clips: value, bootstrap interval, shuffled control; of all clips and of each category.

A metric gives two numbers for a clip, and its figure is the sum of the first over the sum of the second: a mean of
scores (second number 1), an F1, a mean over events. Clips for which it is undefined have 0 and 0. With the sound (or
text) of another clip the same function gives the shuffled control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from javis.eval.javisbench.store import Measured
from javis.eval.stats import Ratio, jackknife

Parts = Mapping[str, Measured]
Counts = tuple[float, float]
Score = Callable[[Parts, Parts], Counts | None]  # (clip, the one its sound or text is taken from)

LEAST_FOR_INTERVAL = 5  # clips; a bootstrap of fewer says little
MOST_DRAWS, DRAWN = 2000, 4_000_000
BLOCKS = 20  # left out one by one where there are more clips


@dataclass(frozen=True)
class Scores:
    """A metric of N clips: its two numbers for each, and for each of S derangements (none if it has no control)."""

    own: np.ndarray  # float64 [N, 2]
    shuffled: np.ndarray  # float64 [S, N, 2]

    @property
    def defined(self) -> np.ndarray:
        """Which clips have a figure: bool [N]."""
        return np.asarray(self.own[:, 1] > 0)

    def figure(self, chosen: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
        """Plain json values for the clips whose indices are given: value, low, high, shuffled, n."""
        own = self.own[chosen]
        own = own[own[:, 1] > 0]
        ratio = Ratio(own[:, 0], own[:, 1])
        ends = None
        if len(own) >= LEAST_FOR_INTERVAL:
            ends = ratio.interval(draws=max(200, min(MOST_DRAWS, DRAWN // len(own))), seed=seed)
        pairs = self.shuffled[:, chosen].reshape(-1, 2)
        return {
            "value": rounded(ratio.value),
            "low": rounded(None if ends is None else ends[0]),
            "high": rounded(None if ends is None else ends[1]),
            "shuffled": rounded(Ratio(pairs[:, 0], pairs[:, 1]).value) if len(pairs) else None,
            "n": len(own),
        }


def score_clips(clips: Sequence[Parts], score: Score, *, shuffle: bool = True, seed: int = 0) -> Scores:
    """Run a metric on every clip, and on every clip with the sound (or text) of others."""
    own = np.array([_counts(score, clip, clip) for clip in clips]).reshape(-1, 2)
    rounds = derangements(len(clips), seed) if shuffle else []
    shuffled = [[_counts(score, clip, clips[j]) for clip, j in zip(clips, order, strict=True)] for order in rounds]
    return Scores(own, np.array(shuffled).reshape(len(rounds), len(clips), 2))


def _counts(score: Score, clip: Parts, other: Parts) -> Counts:
    found = score(clip, other)
    if found is None or not all(map(math.isfinite, found)):
        return 0.0, 0.0
    return found


def derangements(count: int, seed: int = 0) -> list[np.ndarray]:
    """Permutations [count] in which nothing stays at its place: eight, fewer for few or very many clips."""
    order = np.random.default_rng(seed).permutation(count)
    found = []
    for shift in range(1, min(max(1, min(8, 2000 // max(1, count))), count - 1) + 1):
        other: np.ndarray = np.empty(count, dtype=int)
        other[order] = np.roll(order, shift)
        found.append(other)
    return found


# --- distances ----------------------------------------------------------------------------------------------------

Distance = Callable[[np.ndarray], float]


def distance_figure(vectors: np.ndarray, distance: Distance, *, interval: bool = True) -> dict[str, Any]:
    """Value of a distance of clips' vectors [N, D] to real ones; its jackknife interval; None for fewer than 2 clips.

    The interval lies around ``corrected``, the value less the bias of order 1/N (`jackknife`), which is large for few
    clips. More than `BLOCKS` clips are left out in blocks. Where there are not more clips than dimensions
    (``rank_deficient``) the covariance is singular, and the value says more about N than about the clips.
    """
    count = len(vectors)
    figure: dict[str, Any] = {"value": None, "low": None, "high": None, "corrected": None, "shuffled": None, "n": count}
    if count < 2:
        return figure
    figure["rank_deficient"] = bool(count <= vectors.shape[1])
    if not interval or count < LEAST_FOR_INTERVAL:
        figure["value"] = rounded(distance(vectors))
        return figure
    blocks = np.array_split(np.random.default_rng(0).permutation(count), min(count, BLOCKS))
    found = jackknife(len(blocks), lambda kept: distance(vectors[np.concatenate([blocks[b] for b in kept])]))
    figure |= {
        "value": rounded(found.value),
        "corrected": rounded(found.corrected),
        "low": rounded(found.low),
        "high": rounded(found.high),
    }
    return figure


def rounded(value: float | None, digits: int = 6) -> float | None:
    """Significant digits enough for any table; None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
