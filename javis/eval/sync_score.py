"""One number for how well picture and sound of a clip agree, without weights and without knowing the prompt.

It ranks candidates of one clip (:mod:`javis.best_of`). The report for people is sync.py, which is told the prompt.
"""

from __future__ import annotations

import math

import numpy as np

from javis.eval.matching import match_events
from javis.eval.motion import video_events
from javis.eval.onsets import HOP, Sound, audio_onsets, band_rise
from javis.eval.tracking import Picture

TOLERANCE = 0.05  # seconds between what is seen and what is heard
SMOOTHING = 0.03  # seconds: deviation of the Gaussian over motion and loudness, half a frame at 16 fps


def sync_score(video: np.ndarray, audio: np.ndarray, fps: float, sample_rate: int) -> float:
    """How well picture and sound agree, in 0..1.

    ``F1 * (1 - 2^-pairs) * (1 + max(r, 0)) / 2``: the F1 of events seen and heard within 50 ms, each pair counted as
    ``1 - |offset| / 100 ms``; lowered where few pairs speak for it, as one may be luck; and lowered where the motion
    energy (mean absolute difference of frames) does not rise and fall with the onset strength, r being Pearson's
    correlation of the two in time. What shows no event or sounds of none scores 0.

    The score does not know that a source may be unseen or a motion silent: both count as events without a partner, so
    scores of different prompts cannot be compared.

    Args:
        video: uint8 (or float in 0..1) [T, H, W, 3]; frame i shows the instant i / fps.
        audio: float [N] in [-1, 1], mono.
        fps: frames per second. sample_rate: Hz.

    Raises:
        ValueError: shapes, dtypes or rates that cannot be read.
    """
    picture, sound = Picture(video), Sound(audio, sample_rate)
    seen = [event.time for event in video_events(picture, fps)]
    heard = [event.time for event in audio_onsets(sound, sample_rate)]
    pairs = match_events(seen, heard, TOLERANCE)
    if not pairs:
        return 0.0
    close = sum(1 - abs(seen[i] - heard[j]) / (2 * TOLERANCE) for i, j in pairs)
    f1 = 2 * close / (len(seen) + len(heard))
    together = max(0.0, motion_sound_correlation(picture.frames, sound, fps))
    return float(f1 * (1 - math.pow(2.0, -len(pairs))) * (1 + together) / 2)


def motion_sound_correlation(frames: np.ndarray, sound: Sound, fps: float) -> float:
    """Pearson correlation in time of motion energy and onset strength, both smoothed; 0 where one of them is constant.

    Args:
        frames: float [T, H, W, 3]. sound: of the same clip.
    """
    if len(frames) < 3:
        return 0.0
    motion = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3), dtype=np.float64)
    onset = np.sqrt((band_rise(sound.banded) ** 2).sum(axis=1))
    times = np.arange(len(onset)) * HOP
    between = (np.arange(len(motion)) + 0.5) / fps  # a difference belongs to the instant between its frames
    inside = (times >= between[0]) & (times <= between[-1])
    if inside.sum() < 3:
        return 0.0
    a = _smooth(np.interp(times[inside], between, motion))
    b = _smooth(onset[inside])
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 1e-12 else 0.0


def _smooth(values: np.ndarray) -> np.ndarray:
    reach = math.ceil(3 * SMOOTHING / HOP)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) * HOP / SMOOTHING) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), taps / taps.sum(), mode="valid")
