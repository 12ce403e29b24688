"""docs/benchmarks.md is what the rows say, and the README's figures stand in it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks/tables.py").is_file(), reason="needs a source tree")


def test_the_page_is_generated_from_the_rows() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    rows = tables.read_rows(ROOT / "benchmarks/results")
    assert rows, "no rows in benchmarks/results"
    assert (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8") == tables.page(rows), "run `make docs`"
    assert all({"device", "torch", "commit", "date"} <= set(row) for row in rows)


def test_figures_of_the_readme_stand_in_the_page() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    table = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    figures = [figure for line in table for figure in re.findall(r"\d+\.\d{2,}", line)]
    assert figures, "the README shows no measured figure"
    missing = [figure for figure in figures if figure not in page]
    assert not missing, f"figures of the README without a row: {missing}"
