"""What was measured survives; what is half-written, changed or of other files is measured again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from javis.eval.javisbench.store import Measured, Store, identity_of


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("i3d", "a", "one", Measured({"x": [1, None]}, {"video": np.arange(3, dtype=np.float32)[::-1]}))
    found = store.get("i3d", "a", "one")
    assert found is not None and found.facts == {"x": [1, None]}
    np.testing.assert_array_equal(found.arrays["video"], [2, 1, 0])
    assert store.get("i3d", "a", "two") is None and store.get("i3d", "b", "one") is None
    assert not list(tmp_path.rglob(".*"))


def test_half_written_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("i3d", "a", "one", Measured({}, {"video": np.zeros(3)}))
    (tmp_path / "i3d" / "a.safetensors").write_bytes(b"cut")
    assert store.get("i3d", "a", "one") is None
    (tmp_path / "i3d" / "a.json").write_text('{"identity": "one", "facts":')
    assert store.get("i3d", "a", "one") is None and not store.has("i3d", "a", "one")


def test_identity_changes_with_the_file_and_the_facts(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"abc")
    before = identity_of((path, None), part="sync", seconds=None)
    assert identity_of((path, None), part="sync", seconds=None) == before
    assert identity_of((path, None), part="sync", seconds=2.0) != before
    assert identity_of((path, path), part="sync", seconds=None) != before
    os.utime(path, ns=(1, 1))
    assert identity_of((path, None), part="sync", seconds=None) != before
