"""Text hidden states on disk: a prompt that was encoded once is not encoded again.

The caption encoder of the full-size model is larger than its diffusion transformer. Who makes many clips of the same
prompts keeps its results:

>>> cache = ConditionCache("~/.cache/javis/conditions", limit=2 << 30)
>>> encode = CachedTextEncoder(text_encoder, cache, identity=component_identity(folder), dtype=torch.bfloat16)
>>> hidden, mask = encode(["a red ball bounces"])

One safetensors file per caption, named by a hash of the caption, the encoder's identity and the dtype. Files appear
whole or not at all; one that cannot be read is made again and replaced; the least recently used ones are removed beyond
the limit. Priors are drawn from hidden states with the seed of each clip, so it is their input that is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from javis.errors import UsageError
from javis.media import atomic_file, check_writable
from javis.model.text import TextEncoder

FORMAT = "javis-condition-1"  # part of every key: other contents get another name
LEFTOVER_SECONDS = 3600  # a temporary file older than this belongs to a run that was killed

log = logging.getLogger(__name__)


class ConditionCache:
    """A folder of tensors by key.

    Args:
        folder: made if it is not there; ``~`` is the home folder. Several processes may share it.
        limit: bytes that the files may take together.

    Raises:
        UsageError: the folder cannot be written, or the limit is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], *, limit: int = 2 << 30) -> None:
        if limit < 1:
            raise UsageError(f"the limit of the condition cache must be at least 1 byte, got {limit}")
        self.folder, self.limit = Path(folder).expanduser(), limit
        check_writable(self.folder / "entry.safetensors")

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under a key; None if there are none, or none that can be read."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    raise ValueError("it belongs to another key")
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s is not usable (%s); it is made again", path, " ".join(str(error).split()))
            return None
        with contextlib.suppress(OSError):  # someone may have removed it by now
            os.utime(path)  # used just now
        return found

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a key, and remove what is over the limit. A full disk costs the entry, not the clip."""
        path = self.path(key)
        try:
            with atomic_file(path) as temporary:
                save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, {"key": key})
        except (SafetensorError, OSError, UsageError) as error:
            log.warning("%s could not be written (%s); it is not kept", path, " ".join(str(error).split()))
        self._trim()

    def _trim(self) -> None:
        entries = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # removed by another process
                status = path.stat()
                if path.name.startswith("."):
                    if time.time() - status.st_mtime > LEFTOVER_SECONDS:
                        path.unlink()
                else:
                    entries.append((status.st_mtime_ns, status.st_size, path))
        left = sum(size for _, size, _ in entries) - self.limit
        for _, size, path in sorted(entries):
            if left <= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            left -= size


class CachedTextEncoder:
    """A text encoder that looks into a cache first, caption by caption, and encodes the missing ones together.

    Args:
        encoder: hidden states of a caption must not depend on the batch it is in (captions are padded to one length).
        cache: where.
        identity: which encoder, with which weights (:func:`component_identity`).
        dtype: of the hidden states.
    """

    def __init__(self, encoder: TextEncoder, cache: ConditionCache, *, identity: str, dtype: torch.dtype) -> None:
        self.encoder, self.cache, self.identity, self.dtype = encoder, cache, identity, dtype
        self.hits = self.misses = 0
        self._read: dict[str, tuple[Tensor, Tensor]] = {}

    def read(self, captions: Sequence[str]) -> bool:
        """Read what the cache has of these captions, for the next call. True: that call needs no encoder."""
        self._read = self._entries(captions)
        return all(caption in self._read for caption in captions)

    def key(self, caption: str) -> str:
        """Name of the entry of a caption."""
        digest = hashlib.sha256()
        for part in (FORMAT, self.identity, str(self.dtype), caption):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)  # lengths keep "a" + "bc" and "ab" + "c" apart
        return digest.hexdigest()

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, C] in ``dtype`` and mask bool [B, L], on the device the encoder gives.

        From the cache alone they come on the CPU: the encoder need not even be loaded.
        """
        ready = {caption: self._read[caption] for caption in captions if caption in self._read}
        found = ready | self._entries([caption for caption in captions if caption not in ready])
        missing = [caption for caption in dict.fromkeys(captions) if caption not in found]
        self.hits, self.misses = self.hits + len(found), self.misses + len(missing)
        if missing:
            hidden, mask = self.encoder(missing)
            hidden = hidden.to(self.dtype)
            for caption, h, m in zip(missing, hidden, mask, strict=True):
                self.cache.put(self.key(caption), {"hidden": h, "mask": m.bool()})
                found[caption] = h, m.bool()
            for caption, (h, m) in found.items():
                found[caption] = h.to(hidden.device), m.to(hidden.device)
        lengths = {h.shape for h, _ in found.values()}
        if len(lengths) > 1:
            raise ValueError(f"hidden states of different shapes cannot be joined: {sorted(map(tuple, lengths))}")
        return torch.stack([found[c][0] for c in captions]), torch.stack([found[c][1] for c in captions])

    def _entries(self, captions: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Hidden states and mask of those captions that the cache has."""
        found = {}
        for caption in dict.fromkeys(captions):
            entry = self.cache.get(self.key(caption))
            if entry is not None and self._fits(entry):
                found[caption] = entry["hidden"], entry["mask"]
        return found

    def _fits(self, entry: dict[str, Tensor]) -> bool:
        hidden, mask = entry.get("hidden"), entry.get("mask")
        return (
            hidden is not None and mask is not None and hidden.ndim == 2 and hidden.dtype == self.dtype
            and mask.dtype == torch.bool and mask.shape == hidden.shape[:1]
        )  # fmt: skip


def component_identity(folder: str | os.PathLike[str]) -> str:
    """Digest of a component's folder: names and sizes of its files, small ones whole, of large ones both ends.

    Raises:
        UsageError: no such folder.
    """
    root, digest = Path(folder), hashlib.sha256()
    if not root.is_dir():
        raise UsageError(f"{str(root)!r} is no folder of a component")
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            if size > 1 << 20:
                file.seek(max(1 << 20, size - (1 << 20)))
                digest.update(file.read())
    return digest.hexdigest()[:32]


__all__ = ["CachedTextEncoder", "ConditionCache", "component_identity"]
