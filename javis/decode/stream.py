"""Decode and write at once: the encoder takes frames while later ones are decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from torch import Tensor

from javis.media import write_frames


def write_decoded(
    path: str | os.PathLike[str],
    chunks: Iterable[Tensor],
    audio: np.ndarray | Callable[[], np.ndarray],
    *,
    frames: int,
    fps: float,
    sample_rate: int,
    scale_to: tuple[int, int] | None = None,
    quality: int = 16,
    keep: bool = False,
) -> np.ndarray | None:
    """Write the mp4 of `javis.media.write_clip` from the chunks of `VideoDecoder.stream`.

    Args:
        path: file to write, all or nothing. chunks: uint8 [n, H, W, 3], ``frames`` of them in all.
        audio: float [N], or a function that makes it; it is called when all frames are decoded, while the last of them
            are still being encoded.
        keep: also return all frames, uint8 [frames, H, W, 3] (for the contact sheet and the report).

    Raises:
        UsageError, FailedError: as `javis.media.write_frames`.
    """
    kept: list[np.ndarray] = []

    def arrays() -> Iterator[np.ndarray]:
        for chunk in chunks:
            array = chunk.numpy()
            if keep:
                kept.append(array)
            yield array

    write_frames(path, arrays(), audio, frames, fps, sample_rate, scale_to=scale_to, quality=quality)
    return np.concatenate(kept) if keep else None
