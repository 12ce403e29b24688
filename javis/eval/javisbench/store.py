"""What was measured of each clip, on disk: one file for each clip and each part of the measurement.

``FOLDER/PART/KEY.json`` holds what a part found out about a clip, with the identity of what it was found from (files,
text, extractor, options); embeddings lie beside it in ``KEY.safetensors``. Files appear whole or not at all, the json
last. A run that was killed goes on behind what is there; whatever has another identity is measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from javis.media import atomic_file, write_text


@dataclass(frozen=True)
class Measured:
    """One part of one clip: plain json values, and arrays."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


def identity_of(files: tuple[Path | None, ...], **facts: Any) -> str:
    """Digest of what a measurement depends on: size and time of change of each file, and plain json values.

    Raises:
        OSError: a file is gone.
    """
    stamps = []
    for path in files:
        found = None if path is None else path.stat()
        stamps.append(None if found is None else [str(path), found.st_size, found.st_mtime_ns])
    text = json.dumps([stamps, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Store:
    """The measured clips below a folder. Several processes may write, each its own clips."""

    folder: Path

    def has(self, part: str, key: str, identity: str) -> bool:
        return self._facts(part, key, identity) is not None

    def get(self, part: str, key: str, identity: str) -> Measured | None:
        """What was measured, or None if nothing was from this, or the files are not what was written."""
        facts = self._facts(part, key, identity)
        if facts is None:
            return None
        if not facts.pop("arrays"):
            return Measured(facts)
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return Measured(facts, load_file(self._path(part, key, ".safetensors")))
        except (SafetensorError, OSError):
            return None

    def put(self, part: str, key: str, identity: str, measured: Measured) -> None:
        path = self._path(part, key, ".json")
        path.unlink(missing_ok=True)  # else it would describe the new arrays if this is killed in between
        if measured.arrays:
            from safetensors.numpy import save_file

            with atomic_file(self._path(part, key, ".safetensors")) as temporary:
                arrays = {name: np.ascontiguousarray(array) for name, array in measured.arrays.items()}
                save_file(arrays, temporary)
        facts = {"identity": identity, "arrays": bool(measured.arrays), "facts": dict(measured.facts)}
        write_text(path, json.dumps(facts) + "\n")

    def _facts(self, part: str, key: str, identity: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self._path(part, key, ".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("identity") != identity or not isinstance(found.get("facts"), dict):
            return None
        return {**found["facts"], "arrays": found["arrays"]}

    def _path(self, part: str, key: str, suffix: str) -> Path:
        return self.folder / part / f"{key}{suffix}"
