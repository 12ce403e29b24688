"""Cosine similarities of embeddings: text and clip, AVHScore, JavisScore."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from javis.eval.metrics.protocol import MetricProtocol, as_vectors, is_official, same_width

_LEAST_NORM = 1e-6  # a shorter vector counts as one of this length


def cosine_similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of the rows of [N, D] with those of [N, D] or of [1, D]: float64 [N]. A zero vector has cosine 0."""
    x, y = as_vectors(a, "embeddings"), as_vectors(b, "embeddings")
    same_width(x, y)
    if len(y) not in (1, len(x)):
        raise ValueError(f"{len(x)} and {len(y)} embeddings, expected equally many (or one on the right)")
    norms = np.maximum(np.linalg.norm(x, axis=1), _LEAST_NORM) * np.maximum(np.linalg.norm(y, axis=1), _LEAST_NORM)
    return np.asarray((x * y).sum(axis=1) / norms)


def cosine_similarity_mean(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine of pairs: [N, D] with [N, D] -> float in [-1, 1].

    ImageBind's text-video, text-audio and audio-video similarity, the CLIP and CLAP scores, and the CAVP score.

    Raises:
        ValueError: not equally many, different widths, none, or values that are not finite.
    """
    return float(cosine_similarities(a, b).mean())


def avh_score(frames: np.ndarray, audio: np.ndarray) -> float:
    """AVHScore of one clip (arXiv 2404.14381): mean cosine of every frame [N, D] with the whole audio [D]."""
    return float(cosine_similarities(frames, np.atleast_2d(audio)).mean())


def javis_score(
    video_windows: Sequence[np.ndarray],
    audio_windows: np.ndarray,
    *,
    topk_min: float = 0.4,
    protocol: MetricProtocol = "corrected",
) -> float:
    """JavisScore of one clip (arXiv 2503.23377): how well the worst frames of each window fit its sound.

    The mean over windows of the mean of the k smallest cosines between the window's frames and its audio.

    Args:
        video_windows: embeddings of the frames of each window, [n_i, D] each.
        audio_windows: embedding of the audio of each window, [W, D].
        topk_min: share of the frames of a window (k = int(n * share)), or k itself if an int.
        protocol: with ``corrected`` k is at least 1 and at most n. ``official`` gives NaN where the share leaves no
            frame (n <= 2 with 0.4).

    Raises:
        ValueError: no window, another number of audio windows, a share outside (0, 1], a k below 1 (or, officially,
            above n), embeddings that cannot be read.
    """
    audio = as_vectors(audio_windows, "audio embeddings")
    if len(video_windows) != len(audio):
        raise ValueError(f"{len(video_windows)} video and {len(audio)} audio windows, expected equally many")
    if not (topk_min >= 1 if isinstance(topk_min, int) else 0 < topk_min <= 1):
        raise ValueError(f"topk_min is {topk_min}, expected a share in (0, 1] or a number of frames >= 1")
    official = is_official(protocol)
    scores = []
    for frames, sound in zip(video_windows, audio, strict=True):
        cosines = np.sort(cosine_similarities(frames, sound[None]))
        count = len(cosines)
        k = topk_min if isinstance(topk_min, int) else int(count * topk_min)
        if not official:
            k = min(max(k, 1), count)
        elif k > count:
            raise ValueError(f"topk_min is {k} and a window has {count} frames; the official code fails there as well")
        scores.append(float(cosines[:k].mean()) if k else math.nan)
    return float(np.mean(scores))
