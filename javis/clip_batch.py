"""What the pipeline returns."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from javis.sample import Order
from javis.variants import TEACHER, Choice


class Candidate(NamedTuple):
    """One of the clips from which best-of-N took the best: its seed and sync score (:mod:`javis.eval.sync_score`)."""

    seed: int
    score: float


@dataclass(frozen=True)
class ClipBatch:
    """Generated clips.

    Attributes:
        video: uint8 [B, T, H, W, 3]. audio: float32 [B, samples] in -1..1; both last exactly ``seconds``.
        fps: frames per second. sample_rate: Hz.
        prompts: the captions the model was given. seeds: one per clip.
        steps, guidance, audio_guidance, order: what was used. audio_seeds: of the sound's noise, if they were others.
        forwards: of the model per clip; a guided evaluation is two. options: of the sampler, those that are not exact
            or not the default. caches: what was re-used for each clip, if anything (javis/sample/cache.py).
        seconds_per_stage: time spent in text, prior, condition, denoise, video_decode, audio_decode, of all batches.
        random_weights: the model was never trained; the clips are noise.
        choice: the variant that made the clips, and why it was the teacher if the checkpoint has a student.
        candidates: with best-of-N, for each clip all that it was chosen from; ``seeds`` holds the seed of the best.
    """

    video: np.ndarray
    audio: np.ndarray
    fps: float
    sample_rate: int
    prompts: list[str]
    seeds: list[int]
    steps: int
    guidance: float
    audio_guidance: float
    order: Order = "together"
    seconds_per_stage: dict[str, float] = field(default_factory=dict)
    random_weights: bool = False
    forwards: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    audio_seeds: list[int] | None = None
    choice: Choice = TEACHER
    candidates: list[list[Candidate]] | None = None
    caches: list[dict[str, Any]] | None = None

    @property
    def seconds(self) -> float:
        return self.video.shape[1] / self.fps

    def __len__(self) -> int:
        return len(self.video)

    def save(self, path: str | os.PathLike[str], index: int = 0, *, scale_to: tuple[int, int] | None = None) -> Path:
        """Write clip ``index`` as mp4 (h264, aac), optionally scaled smoothly to (height, width)."""
        from javis.media import write_clip

        write_clip(path, self.video[index], self.audio[index], self.fps, self.sample_rate, scale_to=scale_to)
        return Path(path)
