"""Cached features of real clips: the official file, and our own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from javis.errors import UsageError
from javis.eval.javisbench.references import Reference, read_cache, write_cache


def official(rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, width, generator=generator) for name, width in (("video", 400), ("audio", 1024))}


def test_the_official_cache(tmp_path: Path) -> None:
    """torch.save of {"video", "audio"}; row i is row i of the CSV file."""
    path = tmp_path / "JavisBench-mini-vanilla-max4s.pt"
    tensors = official()
    torch.save(tensors, path)
    found = read_cache(path, 6)
    np.testing.assert_array_equal(found.of("i3d", "video"), tensors["video"].numpy())
    np.testing.assert_array_equal(found.of("audioclip", "audio", np.array([4, 1])), tensors["audio"][[1, 4]].numpy())
    assert found.of("builtin", "video").shape == (0, 0)


def test_a_cache_of_other_prompts_or_widths_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.pt"
    torch.save(official(), path)
    with pytest.raises(UsageError, match=r"6\] clips, and the prompts have 20 rows"):
        read_cache(path, 20)
    torch.save({**official(), "audio": torch.zeros(6, 512)}, path)
    with pytest.raises(UsageError, match="widths"):
        read_cache(path, 6)
    torch.save({"features": torch.zeros(6, 400)}, path)
    with pytest.raises(UsageError, match="expected the official"):
        read_cache(path, 6)
    torch.save({**official(), "when": Path("x")}, path)
    with pytest.raises(UsageError, match="refused"):
        read_cache(path, 6)
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UsageError, match="cannot be read"):
        read_cache(path, 6)
    with pytest.raises(UsageError, match="there is no"):
        read_cache(tmp_path / "none.pt", 6)


def test_our_own_cache_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    video = np.arange(12.0).reshape(3, 4)
    video[1] = np.nan  # a clip without features
    written = Reference("real", {("builtin", "video"): video}, {"builtin": "abc"}, None, ("rain", "rain", "wind"))
    write_cache(path, written)
    found = read_cache(path, None)
    assert (found.source, found.hashes, found.scenes) == ("real", {"builtin": "abc"}, ("rain", "rain", "wind"))
    np.testing.assert_array_equal(found.of("builtin", "video"), video[[0, 2]])
    np.testing.assert_array_equal(found.of("builtin", "video", scene="rain"), video[:1])


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(official(), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="was not written by"):
        read_cache(tmp_path / "model.safetensors", 6)
