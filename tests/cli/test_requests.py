"""Rows of a CSV file: what is accepted comes back as written, what is not is named with its line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from javis.errors import UsageError
from javis.requests import MAX_PROMPT, ClipRequest, check_request, read_requests, slug

on_disk = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
# Any text a CSV cell can hold; surrogates cannot be encoded, NUL is refused.
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
prompts = cells.filter(lambda text: text.strip())


def write_csv(path: Path, rows: list[list[object]]) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path.write_bytes(text.getvalue().encode())
    return path


@on_disk
@given(
    rows=st.lists(
        st.tuples(prompts, st.integers(0, 2**63 - 1), st.integers(1, 1000), st.floats(0.001, 1e6)),
        min_size=1,
        max_size=8,
    )
)
def test_good_rows_come_back_as_written(tmp_path: Path, rows: list[tuple[str, int, int, float]]) -> None:
    table = [["id", "Text", "seed", "steps", "seconds"], *([f"clip{i}", *row] for i, row in enumerate(rows))]
    requests, faults = read_requests(write_csv(tmp_path / "p.csv", table))
    assert not faults
    assert [(r.stem, r.prompt, r.seed, r.steps, r.seconds) for r in requests] == [
        (f"clip{i}", text.strip(), seed, steps, seconds) for i, (text, seed, steps, seconds) in enumerate(rows)
    ]


@on_disk
@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(data)
    said = "p.csv"
    try:
        assert read_requests(path).requests
    except UsageError as error:
        said = str(error)
    assert "p.csv" in said


@on_disk
@given(text=cells, header=st.sampled_from(["prompt", "text\n", "prompt,seed,steps\n", "id,text,seconds\r\n"]))
def test_any_text_under_a_header_is_read_or_refused(tmp_path: Path, text: str, header: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes((header + text).encode())
    try:
        requests, faults = read_requests(path)
    except UsageError:
        return
    assert not {request.line for request in requests} & {fault.line for fault in faults}
    for request in requests:
        check_request(request)
        assert (tmp_path / f"{request.stem}.mp4").parent == tmp_path
    assert len({request.stem.lower() for request in requests}) == len(requests)


def test_defaults_fill_empty_cells(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "p.csv", [["prompt", "seed"], ["A Red ball!", ""], ["", ""], ["a box", "77"]])
    assert read_requests(path, seed=5, steps=3, seconds=1.5) == (
        [
            ClipRequest("0001-a-red-ball", "A Red ball!", 5, 3, 1.5, line=2),
            ClipRequest("0002-a-box", "a box", 77, 3, 1.5, line=4),
        ],
        [],
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has neither"),
        ([["seed"], ["1"]], "has neither"),
        ([["prompt", "text"], ["a", "b"]], "has prompt and text"),
        ([["prompt", "seed", "seed"], ["a", "1", "2"]], "more than one column 'seed'"),
        ([["prompt"]], "no rows"),
        ([["prompt"], ["a", "red ball"]], "line 2: 2 cells under 1 columns"),
        ([["prompt", "seed"], ["a", "x"]], "line 2: seed 'x' is not a whole number"),
        ([["prompt", "seed"], ["a", "-1"]], "line 2: seed -1 is unusable"),
        ([["prompt", "steps"], ["a", "0"]], "line 2: steps must be a whole number from 1 to 1000, got 0"),
        ([["prompt", "steps"], ["a", "2.5"]], "line 2: steps '2.5' is not a whole number"),
        ([["prompt", "seconds"], ["a", "nan"]], "line 2: seconds must be a number above 0, got nan"),
        ([["prompt", "seconds"], ["a", "1e999"]], "got inf"),
        ([["prompt", "seconds"], ["a", "-2"]], "got -2"),
        ([["prompt", "seed"], ["", "4"]], "line 2: the prompt is empty"),
        ([["prompt"], ["a" * (MAX_PROMPT + 1)]], "line 2: prompt of 1001 characters"),
        ([["prompt", "id"], ["a", "../../etc"]], "is not a file name"),
    ],
)
def test_files_without_a_usable_row_are_refused_by_line(tmp_path: Path, rows: list[list[object]], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_requests(write_csv(tmp_path / "p.csv", rows))
    assert message in str(caught.value)


def test_all_faults_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    rows: list[list[object]] = [["prompt", "steps"], *([["bad", "0"]] * 7)]
    with pytest.raises(UsageError, match=r"7 unusable rows: line 2: .*line 6: .*; and 2 more; nothing was generated$"):
        read_requests(write_csv(tmp_path / "p.csv", rows))


def test_unusable_rows_are_named_and_the_others_come_back(tmp_path: Path) -> None:
    rows: list[list[object]] = [
        ["prompt", "id", "steps"],
        ["a ball", "x", ""],
        ["a box", "X", ""],
        ["a bell", "y", "0"],
        ["a", "red", "3", "ball"],
        ["", "z", "4"],
        ["a bell", "y", "5"],
    ]
    requests, faults = read_requests(write_csv(tmp_path / "p.csv", rows), seed=10)
    # The seed of a row without one counts rows, so that it stays the same when another row is corrected.
    assert [(r.stem, r.seed, r.steps, r.line) for r in requests] == [("x", 10, None, 2), ("y", 15, 5, 7)]
    assert [fault.line for fault in faults] == [3, 4, 5, 6]
    for fault, message in zip(
        faults, ("already on line 2", "steps must be", "4 cells under 3", "is empty"), strict=True
    ):
        assert message in fault.message


@pytest.mark.parametrize("content", [b"\xff\xfe\x00random", b"prompt\na\0b\n", b'prompt\n"never closed\n'])
def test_what_is_no_csv_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(UsageError, match=r"UTF-8|zero bytes|is not CSV"):
        read_requests(tmp_path / "p.csv")


@given(st.text())
def test_slug_is_a_file_name(text: str) -> None:
    name = slug(text)
    assert 0 < len(name) <= 60
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
