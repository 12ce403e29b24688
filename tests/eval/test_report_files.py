"""Reports of evaluation commands on disk: where they may go, and what a line in a file of results says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from javis.bench_environment import environment
from javis.errors import UsageError
from javis.eval.report_files import check_report_files, write_report


def test_one_report_is_a_value_in_json_and_a_line_with_its_machine_and_commit(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text('{"kept": 1}\n')
    write_report({"kind": "x", "f1": 0.5}, json_file=tmp_path / "deep" / "x.json", append=results)
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {"kind": "x", "f1": 0.5}
    kept, row = (json.loads(line) for line in results.read_text().splitlines())
    assert kept == {"kept": 1}
    assert list(row)[:2] == ["kind", "f1"]
    assert {"device", "commit", "torch", "date"} <= environment().keys() <= row.keys()


def test_several_rows_are_a_list_in_json_and_a_line_each(tmp_path: Path) -> None:
    rows = [{"steps": 4}, {"steps": 8}]
    write_report(rows, json_file=tmp_path / "x.json", append=tmp_path / "x.jsonl")
    assert json.loads((tmp_path / "x.json").read_text()) == rows
    assert [json.loads(line)["steps"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [4, 8]


def test_what_a_row_says_of_its_machine_stays(tmp_path: Path) -> None:
    write_report({"kind": "x", "commit": "abc", "device": "another machine"}, append=tmp_path / "x.jsonl")
    row = json.loads((tmp_path / "x.jsonl").read_text())
    assert (row["commit"], row["device"]) == ("abc", "another machine")


def test_nothing_is_written_where_nothing_was_asked_for(tmp_path: Path) -> None:
    write_report({"kind": "x"})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_made_is_refused_before_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_report_files(None, tmp_path / "fine.json")
    with pytest.raises(UsageError, match="file"):
        check_report_files(tmp_path / "fine.json", tmp_path / "file" / "inside.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
