"""Eight clips with two bad ones among them, and their latents by the built-in checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from javis.data.encode import EncodePlan
from javis.data.latent_source import LatentSource

PLAN = EncodePlan(num_frames=8, height=32, width=32, fps=16, batch=2, shard_clips=3)
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
GOOD = 8


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def epoch(source: LatentSource, batches: int) -> list[dict[str, Any]]:
    return [source.next() for _ in range(batches)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)
