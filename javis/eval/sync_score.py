"""One number for how well picture and sound of a clip agree, without weights and without knowing the prompt.

It ranks candidates of one clip (:mod:`javis.best_of`). The report for people is sync.py, which is told the prompt; how
much later the sound is than the picture says sync_offset.py; how often the score ranks right says validate.py.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from javis.eval.matching import match_events
from javis.eval.motion import video_events
from javis.eval.onsets import HOP, Sound, audio_onsets, band_rise
from javis.eval.tracking import Picture

TOLERANCE = 0.05  # seconds between what is seen and what is heard
SMOOTHING = 0.03  # seconds: deviation of the Gaussian over motion and loudness, half a frame at 16 fps


@dataclass(frozen=True)
class Evidence:
    """What the score is made of, from picture and sound alone."""

    seen: list[float]  # times of events in the picture, seconds
    heard: list[float]  # onsets of the sound, seconds
    motion: np.ndarray  # [T - 1] motion energy: mean absolute difference of frames i and i + 1, at (i + 0.5) / fps
    restless: np.ndarray  # [T - 1] its part that is everywhere: the median over pixels in place of the mean
    onset: np.ndarray  # [K] onset strength at k * HOP seconds
    fps: float
    video_seconds: float
    audio_seconds: float

    @classmethod
    def of(cls, video: np.ndarray | Picture, audio: np.ndarray | Sound, fps: float, sample_rate: int) -> Evidence:
        """Of video uint8 (or float in 0..1) [T, H, W, 3] and audio float [N]; ValueError if they cannot be read."""
        picture, sound = Picture.of(video), Sound.of(audio, sample_rate)
        seen = [event.time for event in video_events(picture, fps)]
        frames = picture.frames
        change = [np.abs(after - before).mean(axis=-1) for before, after in itertools.pairwise(frames)]
        return cls(
            seen=seen,
            heard=[event.time for event in audio_onsets(sound, sample_rate)],
            motion=np.array([one.mean(dtype=np.float64) for one in change]),
            restless=np.array([np.median(one) for one in change], dtype=np.float64),
            onset=onset_strength(sound),
            fps=fps,
            video_seconds=len(frames) / fps,
            audio_seconds=len(sound.banded) * HOP,
        )

    def distinctness(self) -> float:
        """Share of the sound's rises that belong to its onsets, times the share of the motion that is somewhere; 0..1.

        Noise in the sound rises all the time, noise in the picture moves everywhere: neither says when something
        happens.
        """
        rises, moves = float(self.onset.sum()), float(self.motion.sum())
        if rises <= 0 or moves <= 0:
            return 0.0
        times = np.arange(len(self.onset)) * HOP
        near: np.ndarray = np.zeros(len(times), dtype=bool)
        for onset in self.heard:
            near |= np.abs(times - onset) <= TOLERANCE
        return float(self.onset[near].sum() / rises) * max(0.0, 1 - float(self.restless.sum()) / moves)


def sync_score(video: np.ndarray, audio: np.ndarray, fps: float, sample_rate: int) -> float:
    """How well picture and sound agree, in 0..1.

    ``F1 * (1 - 2^-pairs) * (1 + max(r, 0) * d) / 2``: the F1 of events seen and heard within 50 ms, each pair counted
    as ``1 - |offset| / 100 ms``; lowered where few pairs speak for it, as one may be luck; and lowered where the motion
    energy (mean absolute difference of frames) does not rise and fall with the onset strength, r being Pearson's
    correlation of the two in time and d (`Evidence.distinctness`) how far both stand out of what changes all the time.
    What shows no event or sounds of none scores 0.

    The score does not know that a source may be unseen or a motion silent: both count as events without a partner, so
    scores of different prompts cannot be compared.

    Args:
        video: uint8 (or float in 0..1) [T, H, W, 3]; frame i shows the instant i / fps.
        audio: float [N] in [-1, 1], mono.
        fps: frames per second. sample_rate: Hz.

    Raises:
        ValueError: shapes, dtypes or rates that cannot be read.
    """
    return score_of(Evidence.of(video, audio, fps, sample_rate))


def score_of(evidence: Evidence) -> float:
    """`sync_score` of what has been found in a clip."""
    agreement = event_agreement(evidence.seen, evidence.heard)
    if not agreement:
        return 0.0
    r = max(0.0, float(lag_correlation(evidence, [0.0])[0]))
    return agreement * (1 + r * evidence.distinctness()) / 2


def event_agreement(seen: list[float], heard: list[float]) -> float:
    """``F1 * (1 - 2^-pairs)`` of two lists of times (s), each pair within 50 ms counted as 1 - |offset| / 100 ms."""
    pairs = match_events(seen, heard, TOLERANCE)
    if not pairs:
        return 0.0
    close = sum(1 - abs(seen[i] - heard[j]) / (2 * TOLERANCE) for i, j in pairs)
    return float(2 * close / (len(seen) + len(heard)) * (1 - math.pow(2.0, -len(pairs))))


def lag_correlation(evidence: Evidence, lags: np.ndarray | list[float]) -> np.ndarray:
    """Pearson correlation of motion energy and onset strength, both smoothed, with the sound taken ``lags`` s earlier.

    Returns:
        float64 [lags]; each over the time that both cover then, 0 where that is under a quarter of the clip or one of
        the two is constant.
    """
    motion, onset = evidence.motion, evidence.onset
    found = np.zeros(len(lags))
    if len(motion) < 2 or len(onset) < 3:
        return found
    between = (np.arange(len(motion)) + 0.5) / evidence.fps  # a difference belongs to the instant between its frames
    times = np.arange(len(onset)) * HOP
    inside = np.flatnonzero((times >= between[0]) & (times <= between[-1]))
    if len(inside) < 3:
        return found
    a, b = _smooth(np.interp(times[inside], between, motion)), _smooth(onset)
    for number, lag in enumerate(lags):
        at = inside + round(lag / HOP)
        both = (at >= 0) & (at < len(b))
        if both.sum() >= max(3, 0.25 * len(inside)):
            found[number] = _pearson(a[both], b[at[both]])
    return found


def onset_strength(sound: Sound) -> np.ndarray:
    """Rise of the magnitudes over all bands [K] on the grid of ``HOP`` seconds, unsmoothed."""
    return np.asarray(np.sqrt((band_rise(sound.banded) ** 2).sum(axis=1)))


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 1e-12 else 0.0


def _smooth(values: np.ndarray) -> np.ndarray:
    reach = math.ceil(3 * SMOOTHING / HOP)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) * HOP / SMOOTHING) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), taps / taps.sum(), mode="valid")
