"""Networks that turn pictures, sounds and texts into embeddings, found by name in a local folder of public weights.

>>> extractor = find_extractor("imagebind", Path("weights"))
>>> if isinstance(extractor, Missing):
...     print(extractor)  # imagebind skipped: put imagebind_huge.pth at weights/imagebind

Nothing is downloaded, and a network without weights is never replaced: it is reported as missing. ``builtin`` needs no
weights; it makes our fixed features (`javis.eval.frechet_features`) for distances that compare with themselves only.
Read base.py next, then the module of a network.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from javis.eval.extractors.base import Extractor, Missing
from javis.eval.extractors.table import TABLE
from javis.eval.metrics.protocol import MetricProtocol

__all__ = ["EXTRACTORS", "Extractor", "Missing", "find_extractor"]

EXTRACTORS = tuple(TABLE)


def find_extractor(
    name: str,
    weights_folder: str | os.PathLike[str] | None,
    device: str = "cpu",
    *,
    protocol: MetricProtocol = "corrected",
) -> Extractor | Missing:
    """The extractor ``name`` with the weights it finds in ``weights_folder/name``, or what to put there.

    Args:
        name: one of `EXTRACTORS`.
        weights_folder: folder with one folder for each network (docs/metrics.md); None finds ``builtin`` only.
        device: where the network runs.
        protocol: "official" prepares pictures as JavisBench does where that is an accident (I3D).

    Raises:
        ValueError: an unknown name.
        UsageError: the weights are there and cannot be used: damaged, not tensors alone, or of another network.
    """
    if name not in TABLE:
        raise ValueError(f"there is no extractor {name!r}; expected one of {', '.join(TABLE)}")
    entry = TABLE[name]
    folder = None if weights_folder is None else Path(weights_folder) / name
    if entry.put:
        if folder is None:
            return Missing(name, f"{entry.put} at FOLDER/{name}, and name FOLDER with --weights")
        if not folder.is_dir() or not any(folder.iterdir()):
            return Missing(name, f"{entry.put} at {folder}")
    module = importlib.import_module(f"javis.eval.extractors.{name}")
    made: Extractor | Missing = module.load(folder, device, protocol)
    return made
