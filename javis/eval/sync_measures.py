"""What ``javis eval sync`` says about a clip beside the sync report: from picture and sound alone, without a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from javis.eval.metrics import audio_peaks, av_align, video_peaks
from javis.eval.optical_flow import flow_trajectory
from javis.eval.sync_offset import find_offset
from javis.eval.sync_score import Evidence, score_of

STILL = 1e-3  # of the full range: largest mean difference of two frames below which nothing moves
LENGTHS = 0.1  # seconds by which picture and sound may differ unnoticed; a codec's padding is less


@dataclass(frozen=True)
class Measures:
    """Of one clip; times in seconds."""

    evidence: Evidence
    flow_peaks: list[float]
    onset_peaks: list[float]

    @classmethod
    def of(cls, video: np.ndarray, audio: np.ndarray, fps: float, sample_rate: int) -> Measures:
        """Of video uint8 [T, H, W, 3] and audio float [N], N >= 1; ValueError if they cannot be read."""
        evidence = Evidence.of(video, audio, fps, sample_rate)
        return cls(evidence, video_peaks(flow_trajectory(video), fps), audio_peaks(audio, sample_rate))

    def report(self) -> dict[str, Any]:
        """``sync_score``, ``offset`` (see `javis.eval.sync_offset`) and ``av_align``, json values."""
        return {
            "sync_score": round(score_of(self.evidence), 4),
            "offset": find_offset(self.evidence).report(),
            "av_align": self.av_align(self.onset_peaks),
        }

    def av_align(self, onset_peaks: list[float]) -> dict[str, float]:
        """AV-Align of this picture with those onsets: the corrected value (in 0..1) and the official one."""
        fps = self.evidence.fps
        return {
            name: round(av_align(self.flow_peaks, onset_peaks, fps, protocol=name), 4)  # type: ignore[arg-type]
            for name in ("corrected", "official")
        }


def remarks(video: np.ndarray, audio: np.ndarray, fps: float, sample_rate: int) -> list[str]:
    """What is odd about a clip that can be measured all the same; words of a fixed list, so that they can be counted.

    "one frame", "still" (nothing moves), "constant colour", "silent", "lengths differ".
    """
    found = []
    if len(video) == 1:
        found.append("one frame")
    elif np.abs(np.diff(video[:, ::2, ::2].astype(np.int16), axis=0)).mean(axis=(1, 2, 3)).max() / 255 < STILL:
        found.append("still")
    if video.max() - video.min() <= 2:
        found.append("constant colour")
    if not np.abs(audio).max(initial=0.0) > 1e-4:
        found.append("silent")
    if abs(len(video) / fps - len(audio) / sample_rate) > LENGTHS:
        found.append("lengths differ")
    return found
