"""Our fixed features as an extractor: no weights, no download, comparable with themselves only."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from javis.eval import frechet_features
from javis.eval.extractors.base import Extractor, weights_hash
from javis.eval.extractors.pictures import nearest_frames
from javis.eval.metrics.protocol import MetricProtocol
from javis.eval.onsets import Sound


class Builtin(Extractor):
    """Picture [1, 24] and sound [1, 24], as of `javis.eval.frechet_features`: scaled, bounded and projected.

    The picture is brought to the frame rate of the features and the sound to their sample rate first, so that clips of
    any form compare.
    """

    name = "builtin"
    modalities = frozenset({"video", "audio"})

    def __init__(self) -> None:
        self.weights_hash = weights_hash([frechet_features.PATH])

    def embed_video(self, frames: np.ndarray, fps: float) -> np.ndarray:
        shown = frames[nearest_frames(len(frames), fps, frechet_features.FPS)]
        raw = frechet_features.picture_features(shown if len(shown) > 1 else np.repeat(shown, 2, axis=0))
        return self._projected({"picture": raw}, "picture")

    def embed_audio(self, waveform: np.ndarray, rate: int) -> np.ndarray:
        from javis.data.excerpt import resample

        wave = resample(np.asarray(waveform, np.float32), rate, frechet_features.SAMPLE_RATE)
        raw = frechet_features.sound_features(Sound(wave, frechet_features.SAMPLE_RATE))
        return self._projected({"sound": raw}, "sound")

    @staticmethod
    def _projected(raw: dict[str, np.ndarray], name: str) -> np.ndarray:
        return frechet_features.reference().project(raw)[name].astype(np.float32)[None]


def load(folder: Path | None, device: str, protocol: MetricProtocol) -> Builtin:
    return Builtin()
