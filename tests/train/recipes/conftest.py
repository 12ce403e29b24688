"""A tiny checkpoint, and its pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from javis import JavisPipeline

from ...tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, 32x32 pixels, 16 fps."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("recipes"))


@pytest.fixture
def pipe(checkpoint: Path) -> JavisPipeline:
    return JavisPipeline.from_pretrained(checkpoint)
