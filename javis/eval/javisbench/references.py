"""Real clips that generated ones are compared with: cached features, or a folder of clips.

| given | what it is |
|---|---|
| the official cache (.pt) | ``video`` [rows, 400] of I3D and ``audio`` [rows, 1024] of AudioCLIP, in the CSV's order |
| a ``.safetensors`` file | a cache that this harness wrote (``reference.safetensors`` in its output folder) |
| a folder | real clips, measured like the generated ones |

Features of different extractors cannot be compared; a cache says which ones it is of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from javis.errors import UsageError
from javis.media import atomic_file

OFFICIAL_EXTRACTORS = {"video": "i3d", "audio": "audioclip"}
OFFICIAL_WIDTHS = {"video": 400, "audio": 1024}


@dataclass(frozen=True)
class Reference:
    """Vectors of real clips by extractor and kind: ``{("i3d", "video"): float [M, D]}``.

    Attributes:
        source: what it was made from.
        hashes: of the weights of each extractor, None if it is not known.
        rows: for each vector its row in the CSV file; None where they do not belong to rows.
        scenes: for each vector the name of its category (data sets in folders); None where there are none.
        is_official: made by the official code, with its accidents.
    """

    source: str
    vectors: Mapping[tuple[str, str], np.ndarray]
    hashes: Mapping[str, str | None]
    rows: np.ndarray | None = None
    scenes: tuple[str, ...] | None = None
    is_official: bool = False

    def of(self, extractor: str, kind: str, rows: np.ndarray | None = None, scene: str | None = None) -> np.ndarray:
        """Vectors [m, D], those of some rows or of a scene only; [0, 0] if there are none of this extractor."""
        found = self.vectors.get((extractor, kind))
        if found is None:
            return np.zeros((0, 0))
        keep = np.isfinite(found).all(axis=1)
        if rows is not None and self.rows is not None:
            keep &= np.isin(self.rows, rows)
        if scene is not None and self.scenes is not None:
            keep &= np.array([name == scene for name in self.scenes])
        return found[keep]


def read_cache(path: Path, rows: int | None) -> Reference:
    """Features from a file.

    Args:
        path: .pt of the official data set, or .safetensors of this harness.
        rows: of the CSV file; a cache with another number of vectors does not belong to it.

    Raises:
        UsageError: unreadable, of another form, or of other prompts.
    """
    from javis.convert.read import Checkpoint

    file = Checkpoint(path)
    arrays = {name: file.get(name).float().numpy() for name in file.names()}
    if path.suffix == ".safetensors":
        return _own(path, arrays, rows)
    if set(arrays) != set(OFFICIAL_EXTRACTORS) or any(array.ndim != 2 for array in arrays.values()):
        raise UsageError(
            f"{path} holds {', '.join(f'{name} {list(a.shape)}' for name, a in arrays.items())}; expected the official "
            "cache: video [rows, 400] and audio [rows, 1024]"
        )
    wrong = {name: array.shape[1] for name, array in arrays.items() if array.shape[1] != OFFICIAL_WIDTHS[name]}
    if wrong:
        raise UsageError(f"{path} has features of widths {wrong}; expected {OFFICIAL_WIDTHS} (I3D and AudioCLIP)")
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1 or (rows is not None and counts != {rows}):
        raise UsageError(
            f"{path} has features of {sorted(counts)} clips, and the prompts have {rows} rows; expected the cache that "
            "belongs to this CSV file"
        )
    vectors = {(OFFICIAL_EXTRACTORS[name], name): array for name, array in arrays.items()}
    return Reference(
        str(path), vectors, dict.fromkeys(OFFICIAL_EXTRACTORS.values()), np.arange(counts.pop()), is_official=True
    )


def _own(path: Path, arrays: Mapping[str, np.ndarray], rows: int | None) -> Reference:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        about = (file.metadata() or {}).get("javisbench")
    if about is None:
        raise UsageError(f"{path} was not written by 'javis eval javisbench'; expected its reference.safetensors")
    facts = json.loads(about)
    found = None if facts["rows"] is None else np.array(facts["rows"])
    if found is not None and rows is not None and len(found) and found.max() >= rows:
        raise UsageError(f"{path} belongs to a CSV file of at least {found.max() + 1} rows; this one has {rows}")
    vectors = {}
    for name, array in arrays.items():
        extractor, _, kind = name.rpartition(".")
        vectors[extractor, kind] = array
    scenes = None if facts["scenes"] is None else tuple(facts["scenes"])
    return Reference(facts["source"], vectors, facts["hashes"], found, scenes)


def write_cache(path: Path, reference: Reference) -> None:
    """Write a reference so that `read_cache` gives it back."""
    from safetensors.numpy import save_file

    facts = {
        "source": reference.source,
        "hashes": dict(reference.hashes),
        "rows": None if reference.rows is None else reference.rows.tolist(),
        "scenes": None if reference.scenes is None else list(reference.scenes),
    }
    arrays = {f"{extractor}.{kind}": np.asarray(v, np.float32) for (extractor, kind), v in reference.vectors.items()}
    with atomic_file(path) as temporary:
        save_file(arrays, temporary, metadata={"javisbench": json.dumps(facts)})
