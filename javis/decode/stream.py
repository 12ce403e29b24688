"""Decode and write at once: the encoder takes frames while later ones are decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from javis.errors import FailedError
from javis.media import hidden_beside, write_frames


class TakeFrames(Protocol):
    """Who gets the frames of a clip while later ones are decoded (``JavisPipeline.frames_to``)."""

    def __call__(
        self,
        number: int,
        chunks: Iterable[Tensor],
        audio: np.ndarray,
        *,
        frames: int,
        fps: float,
        sample_rate: int,
    ) -> np.ndarray:
        """Clip ``number`` of a batch: chunks uint8 [n, H, W, 3], ``frames`` in all; returns them joined."""
        ...


class StreamedClips:
    """Mp4 files of a batch, written while its clips are decoded: a `TakeFrames`.

    Files lie under hidden names beside their places until :meth:`put` moves them there. Leaving the context, or
    beginning another batch, removes those that were not put. An encoder that fails (a full disk) does not end the
    batch: :meth:`put` raises its error for that clip.
    """

    def __init__(self) -> None:
        self._outs: list[Path] = []
        self._files: dict[Path, Path] = {}
        self._errors: dict[Path, FailedError] = {}

    def begin(self, outs: Sequence[Path]) -> None:
        """The next batch: where its clips go, in its order."""
        self.clear()
        self._outs = list(outs)

    def __call__(
        self, number: int, chunks: Iterable[Tensor], audio: np.ndarray, *, frames: int, fps: float, sample_rate: int
    ) -> np.ndarray:
        kept: list[np.ndarray] = []
        decoded = False

        def watched() -> Iterator[Tensor]:
            nonlocal decoded
            for chunk in chunks:
                kept.append(chunk.numpy())
                yield chunk
            decoded = True

        out, source = self._outs[number], watched()
        try:
            self._files[out] = hidden_beside(out)
            write_decoded(self._files[out], source, audio, frames=frames, fps=fps, sample_rate=sample_rate)
        except FailedError as error:
            for _ in source:  # nothing is left if it was the decode that failed
                pass
            if not decoded:
                raise
            self._errors[out] = error
        return np.concatenate(kept)

    def put(self, out: Path, place: Path) -> bool:
        """Move the file of the clip that goes to ``out`` to ``place``; False: it was not written here.

        Raises:
            FailedError: its encoder failed.
        """
        if out in self._errors:
            raise self._errors[out]
        file = self._files.pop(out, None)
        if file is not None:
            os.replace(file, place)
        return file is not None

    def clear(self) -> None:
        """Remove what was not put anywhere."""
        for file in self._files.values():
            file.unlink(missing_ok=True)
        self._outs, self._files, self._errors = [], {}, {}

    def __enter__(self) -> StreamedClips:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


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
