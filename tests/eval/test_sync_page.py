"""The tables of docs/sync.md are what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks/sync_page.py").is_file(), reason="needs a source tree")


def test_the_tables_are_generated_from_the_rows() -> None:
    from benchmarks.sync_page import PAGE, page, read_rows

    rows = read_rows(ROOT / "benchmarks/results")
    text = PAGE.read_text(encoding="utf-8")
    assert any(row.get("kind") == "eval_validate" for row in rows) and "### Ranking" in text
    assert page(text, rows) == text, "run `make docs`"
    with pytest.raises(ValueError, match="lost the line"):
        page("# nothing", rows)
