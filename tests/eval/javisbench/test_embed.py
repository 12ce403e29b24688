"""Extractors as the harness asks for them."""

from __future__ import annotations

from typing import Any

import pytest

from javis.eval import extractors
from javis.eval.javisbench.embed import Skipped, find
from javis.eval.javisbench.measure import Options


@pytest.mark.parametrize("protocol", ["corrected", "official"])
def test_an_extractor_prepares_clips_by_the_protocol(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def kept(name: str, folder: Any, device: str, **options: Any) -> Any:
        asked.append((name, folder, device, options))
        return extractors.Missing(name, put="x.pt at y")

    monkeypatch.setattr(extractors, "find_extractor", kept)
    found = find("i3d", Options(protocol=protocol, weights="w"))
    assert asked == [("i3d", "w", "cpu", {"protocol": protocol})]
    assert isinstance(found, Skipped) and found.reason == "put x.pt at y"


def test_what_is_missing_says_where_to_put_it() -> None:
    for name in ("i3d", "imagebind", "synchformer", "cavp", "clip", "clap"):
        found = find(name, Options())
        assert isinstance(found, Skipped) and found.reason.startswith("put ")
