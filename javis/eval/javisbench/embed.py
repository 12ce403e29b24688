"""Which arrays of each extractor are stored for a clip; metrics.py computes from them.

| part | arrays |
|---|---|
| builtin, i3d | ``video`` [D] (builtin: ``audio`` [D] as well) |
| audioclip | ``audio`` [D] |
| imagebind | ``video``, ``audio``, ``text``, ``audio_text`` [D]; ``frames`` [T, D] |
| | of the windows of JavisScore: ``video_windows`` [W, 2] (start and end), ``audio_windows`` [W, D] |
| clip | ``frames`` [T, D], ``text`` [D] |
| clap | ``audio``, ``audio_text`` [D] |
| cavp | ``video``, ``audio`` [N, D], row by row at the same times |
| synchformer | ``logits`` [W, classes] |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from javis.errors import UsageError

if TYPE_CHECKING:
    from javis.eval.extractors import Extractor
    from javis.eval.javisbench.measure import ClipData, Options, Task

TEXT_PARTS = ("sync", "imagebind", "clip", "clap")  # what they find depends on the text


@dataclass(frozen=True)
class Skipped:
    """Why there is no extractor, and what to do."""

    reason: str


def find(name: str, options: Options) -> Extractor | Skipped:
    """An extractor by name, from the folder of weights."""
    from javis.eval.extractors import EXTRACTORS, Missing, find_extractor

    if name not in EXTRACTORS:
        return Skipped(f"javis has no extractor {name}")
    found = find_extractor(name, options.weights or None, options.device, protocol=options.protocol)
    return Skipped(f"put {found.put}") if isinstance(found, Missing) else found


@cache
def _loaded(name: str, options: Options) -> Extractor:
    """One of each in a process."""
    found = find(name, options)
    if isinstance(found, Skipped):
        raise UsageError(f"{name}: {found.reason}")
    return found


def embed(part: str, clip: ClipData, task: Task) -> dict[str, np.ndarray]:
    """The arrays of one extractor for one clip; what needs sound is left out where there is none.

    Raises:
        UsageError, ValueError: the clip is nothing for this extractor.
    """
    extractor = _loaded(part, task.options)
    arrays: dict[str, np.ndarray] = {}
    if part in ("builtin", "i3d"):
        arrays["video"] = _single(extractor.embed_video(clip.video, clip.fps))
    if part in ("builtin", "audioclip", "clap", "imagebind") and len(clip.audio):
        arrays["audio"] = _single(extractor.embed_audio(clip.audio, clip.sample_rate))
    if part in ("clip", "imagebind"):
        arrays["frames"] = extractor.embed_video(clip.video, clip.fps)
    if part == "imagebind":
        arrays |= _imagebind(extractor, clip, task)
    if part in ("clip", "imagebind") and task.text is not None:
        arrays["text"] = extractor.embed_text([task.text])[0]
    if part in ("clap", "imagebind") and task.audio_text is not None:
        arrays["audio_text"] = extractor.embed_text([task.audio_text])[0]
    if part == "cavp" and len(clip.audio):
        arrays["video"] = extractor.embed_video(clip.video, clip.fps)
        arrays["audio"] = extractor.embed_audio(clip.audio, clip.sample_rate)
    if part == "synchformer" and len(clip.audio):
        synchformer: Any = extractor
        arrays["logits"] = synchformer.sync_logits(clip.video, clip.fps, clip.audio, clip.sample_rate)
    return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()}


def _single(vectors: np.ndarray) -> np.ndarray:
    """One vector [D] of a clip from [N, D]."""
    return np.asarray(vectors.mean(axis=0) if vectors.ndim == 2 else vectors)


def _imagebind(extractor: Extractor, clip: ClipData, task: Task) -> dict[str, np.ndarray]:
    """The whole picture, and the sound of each window of JavisScore."""
    from javis.eval.metrics import segment_windows

    arrays = {"video": _single(extractor.embed_clip(clip.video, clip.fps))}  # type: ignore[attr-defined]
    if len(clip.audio):
        options = task.options
        windows = segment_windows(
            len(clip.video),
            len(clip.audio),
            clip.fps,
            seconds=options.window_seconds,
            overlap=options.window_overlap,
            rate=clip.sample_rate,
            protocol=options.protocol,
        )
        arrays["video_windows"] = np.array(windows.video)
        arrays["audio_windows"] = np.stack(
            [_single(extractor.embed_audio(clip.audio[s:e], clip.sample_rate)) for s, e in windows.audio]
        )
    return arrays
