"""What the tests of the feeders share."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

from javis.data.feed import FeedPlan, MediaBatch
from javis.data.feed_base import OrderedFeeder
from javis.data.feeders import make_feeder
from javis.data.manifest import Manifest

PLAN = FeedPlan(num_frames=16, height=64, width=64, fps=16, batch=2, seed=4, workers=0, prefetch=2, timeout=60)
CLIPS, SEED = 6, 3
needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="DALI is not installed",
)
BACKENDS = ["pyav", pytest.param("dali", marks=needs_dali)]
MEL_ATOL = 1e-2  # of the golden case `mel`


def feeder(manifest: Manifest, backend: str, **changes: object) -> OrderedFeeder[object]:
    plan = dataclasses.replace(PLAN, **changes)  # type: ignore[arg-type]
    return make_feeder(manifest, plan, backend)  # type: ignore[arg-type, return-value]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2))))


def assert_same(a: MediaBatch, b: MediaBatch) -> None:
    assert a.indices == b.indices and a.ids == b.ids and a.captions == b.captions
    for name in ("video", "waveform", "mel", "fps"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
