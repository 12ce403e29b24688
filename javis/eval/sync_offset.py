"""How much later the sound of a clip is than its picture, and how sure that is.

The sync score as a function of a lag: the sound is taken that much earlier, and only what both streams can then show
counts. Its highest point is the offset. Two cross-correlations make it up: that of the event trains (seen and heard
times, which are finer than a frame) fixes the offset to a few milliseconds; that of onset strength and motion energy,
which needs no events, helps to choose where several lags bring the events together, as with a pendulum.

Nothing is calibrated on clips: within one choice of pairs, the lag that minimises the squared differences is their
mean; between samples of the energies' correlation the top is that of the parabola through three points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from javis.eval.matching import match_events
from javis.eval.onsets import HOP
from javis.eval.sync_score import TOLERANCE, Evidence, event_agreement, lag_correlation

MAX_OFFSET = 0.75  # seconds looked at on either side
RIVAL = 0.1  # seconds from the best lag at which another one counts as a rival
# What cannot be seen or heard at the ends of a clip takes no part; a little more than the detectors leave out.
BLIND = 0.05


@dataclass(frozen=True)
class Offset:
    """Sound minus picture."""

    seconds: float | None  # None where nothing moves or nothing sounds
    confidence: float  # 0..1: how far the best lag is above the best one that is `RIVAL` or more away
    method: Literal["events", "energy", "none"]
    energy_seconds: float | None  # by onset strength and motion energy alone

    def report(self) -> dict[str, float | str | None]:
        """As json values in milliseconds, late sound positive."""
        ms = None if self.seconds is None else round(1000 * self.seconds, 2)
        energy = None if self.energy_seconds is None else round(1000 * self.energy_seconds, 2)
        return {
            "offset_ms": ms,
            "abs_offset_ms": None if ms is None else abs(ms),
            "confidence": round(self.confidence, 4),
            "method": self.method,
            "energy_offset_ms": energy,
        }


def find_offset(evidence: Evidence) -> Offset:
    """The offset of a clip within ``MAX_OFFSET`` either way (less in a clip shorter than twice that).

    Where no event is both seen and heard at any lag the energies alone decide.
    """
    reach = min(MAX_OFFSET, 0.5 * min(evidence.video_seconds, evidence.audio_seconds))
    steps = int(reach / HOP)
    grid = np.arange(-steps, steps + 1) * HOP
    curve = lag_correlation(evidence, grid)
    energy = _top(grid, curve)
    candidates, agreement = event_lags(evidence, reach)
    if len(candidates):
        together = np.maximum(0.0, np.interp(candidates, grid, curve))
        scores = agreement * (1 + together) / 2
        if scores.max() > 0:
            # Of equally good lags the smallest: far offsets are rarer than near ones.
            best = max(range(len(candidates)), key=lambda k: (round(scores[k], 6), -abs(candidates[k])))
            return Offset(float(candidates[best]), _lead(candidates, scores, best), "events", energy)
    if energy is None:
        return Offset(None, 0.0, "none", None)
    return Offset(energy, _lead(grid, np.maximum(curve, 0.0), int(curve.argmax())), "energy", energy)


def event_lags(evidence: Evidence, reach: float = MAX_OFFSET) -> tuple[np.ndarray, np.ndarray]:
    """Lags (s) that bring a seen and a heard event together, and how well all events agree at each, in 0..1.

    Each lag is the mean of all pairs that it makes; what only one of the streams can show at it takes no part.
    """
    seen, heard = np.array(evidence.seen), np.array(evidence.heard)
    found: list[float] = []
    for lag in (heard[None, :] - seen[:, None]).ravel():
        for _ in range(2):
            pairs = match_events(list(seen + lag), list(heard), TOLERANCE)
            lag = float(np.mean([heard[j] - seen[i] for i, j in pairs]))
        found.append(lag)
    lags = np.unique(np.round(found, 5))
    lags = lags[np.abs(lags) <= reach]
    return lags, np.array([event_agreement(*_within(evidence, lag)) for lag in lags])


def _within(evidence: Evidence, lag: float) -> tuple[list[float], list[float]]:
    """Times seen, and times heard less ``lag``, without those at which the other stream is not there."""
    begin = max(0.0, -lag)
    end = min(evidence.video_seconds, evidence.audio_seconds - lag)
    heard = [t - lag for t in evidence.heard]
    pairs = match_events(evidence.seen, heard, TOLERANCE)
    kept = {i for i, _ in pairs}, {j for _, j in pairs}
    inside = [
        [t for k, t in enumerate(times) if k in paired or begin + BLIND <= t <= end - BLIND]
        for times, paired in ((evidence.seen, kept[0]), (heard, kept[1]))
    ]
    return inside[0], inside[1]


def _lead(lags: np.ndarray, scores: np.ndarray, best: int) -> float:
    """How far ``scores[best]`` is above every score at a lag ``RIVAL`` or more away."""
    rivals = scores[np.abs(lags - lags[best]) >= RIVAL]
    return float(np.clip(scores[best] - rivals.max(initial=0.0), 0.0, 1.0))


def _top(grid: np.ndarray, curve: np.ndarray) -> float | None:
    """Where ``curve`` is highest, between its samples; None if it is nowhere above 0."""
    k = int(curve.argmax())
    if curve[k] <= 0:
        return None
    if not 0 < k < len(curve) - 1:
        return float(grid[k])
    left, middle, right = (float(v) for v in curve[k - 1 : k + 2])
    bend = left - 2 * middle + right
    return float(grid[k] + (0.5 * (left - right) / bend * HOP if bend < 0 else 0.0))
