"""What every extractor offers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from javis.errors import UsageError


class Extractor:
    """Embeddings of one network. A network has the methods named in ``modalities``; the others raise `UsageError`.

    Attributes:
        name: of the network, as in `find_extractor`.
        modalities: "video", "audio", "text": those it embeds.
        weights_hash: short digest of its weights, for the fingerprint of a figure.
    """

    name: str
    modalities: frozenset[str] = frozenset()
    weights_hash: str = ""

    def embed_video(self, frames: np.ndarray, fps: float) -> np.ndarray:
        """Frames uint8 [T, H, W, 3] at ``fps`` -> float32 [N, D]: N = T (of every frame) or N = 1 (of the clip)."""
        raise self._cannot("video")

    def embed_clip(self, frames: np.ndarray, fps: float) -> np.ndarray:
        """Frames as above -> float32 [1, D] of the clip: the mean over frames if a network has no way of its own."""
        return self.embed_video(frames, fps).mean(axis=0, keepdims=True)

    def embed_audio(self, waveform: np.ndarray, rate: int) -> np.ndarray:
        """Mono waveform float32 [samples] in [-1, 1] at ``rate`` Hz -> float32 [N, D]."""
        raise self._cannot("audio")

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> float32 [len(texts), D]."""
        raise self._cannot("text")

    def _cannot(self, modality: str) -> UsageError:
        return UsageError(f"{self.name} embeds {', '.join(sorted(self.modalities))}, not {modality}")


@dataclass(frozen=True)
class Missing:
    """A network whose weights are not there. Prints as one line that says what to do; a figure is then skipped."""

    name: str
    put: str  # "X at Y"

    def __str__(self) -> str:
        return f"{self.name} skipped: put {self.put}"


def weights_hash(files: Iterable[Path]) -> str:
    """Digest of weights files: of the name, the size, and the first and last MiB of each."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            size = content.seek(0, 2)
            digest.update(f"{file.name}:{size}".encode())
            for start in (0, max(0, size - (1 << 20))):
                content.seek(start)
                digest.update(content.read(1 << 20))
    return digest.hexdigest()[:12]
