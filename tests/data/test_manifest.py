"""The CSV manifest: what is read, what is written, and how broken rows are named."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from javis.data.manifest import COLUMNS, Manifest, parse_manifest
from javis.errors import UsageError
from tests.data.rows import clip_row

HEADER = "path,id,relpath,num_frames,height,width,aspect_ratio,fps,resolution,audio_path,audio_fps,text"
GOOD = "a.mp4,a,a.mp4,51,240,426,0.563,23.976,102240,a.wav,16000,a red ball"


def written(folder: Path, *lines: str) -> Path:
    path = folder / "m.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_official_columns() -> None:
    assert ",".join(COLUMNS) == HEADER


def test_reads_what_the_official_file_says(tmp_path: Path) -> None:
    manifest = Manifest.read(written(tmp_path, HEADER + ",license", GOOD + ",CC0"))
    (row,) = manifest
    assert len(manifest) == 1 and manifest[0] is row and manifest[:1].rows == (row,)
    assert (row.path, row.audio_path) == (str(tmp_path / "a.mp4"), str(tmp_path / "a.wav"))
    assert (row.num_frames, row.height, row.width, row.fps, row.resolution) == (51, 240, 426, 23.976, 102240)
    assert row.extra == {"license": "CC0"}
    assert row.seconds == pytest.approx(51 / 23.976)


def test_columns_in_any_order_and_whole_numbers_with_a_point(tmp_path: Path) -> None:
    # As other programs write them: a byte order mark, another order, 51.0 for 51.
    names, cells = HEADER.split(","), GOOD.replace(",51,", ",51.0,").split(",")
    path = tmp_path / "m.csv"
    path.write_bytes(("\ufeff" + ",".join(names[::-1]) + "\r\n" + ",".join(cells[::-1]) + "\r\n").encode())
    assert Manifest.read(path)[0].num_frames == 51


@pytest.mark.parametrize(
    "cell, wrong, named",
    [
        (3, "0", "num_frames"), (3, "many", "num_frames"), (3, "1.5", "num_frames"), (4, "-240", "height"),
        (6, "nan", "aspect_ratio"), (7, "0", "fps"), (7, "inf", "fps"), (8, "", "resolution"), (10, "0", "audio_fps"),
        (0, "", "path"), (1, " ", "id"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_with_its_line(tmp_path: Path, cell: int, wrong: str, named: str) -> None:
    cells = GOOD.split(",")
    cells[cell] = wrong
    quoted = GOOD.replace("a red ball", '"a red ball\nand a bell"')  # takes two lines of the file
    path = written(tmp_path, HEADER, quoted, ",".join(cells), GOOD)
    with pytest.raises(UsageError, match=rf"1 broken row: line 4: {named}"):
        Manifest.read(path)
    parsed = parse_manifest(path)
    assert parsed.lines == (2, 5) and [row.line for row in parsed.broken] == [4]


def test_a_row_of_another_width_is_broken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 2: 13 cells under 12 columns"):
        Manifest.read(written(tmp_path, HEADER, GOOD + ", and a bell", GOOD))


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, name: str) -> None:
    header = ",".join(column for column in COLUMNS if column != name)
    with pytest.raises(UsageError, match=f"column {name} missing"):
        Manifest.read(written(tmp_path, header, GOOD))


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "missing"), (HEADER.encode(), "no rows"), (HEADER.encode() + b"\n\xff", "line 2 is not UTF-8"),
        (HEADER.encode() + b"\n\0", "zero bytes"), (HEADER.encode() + b',text\n' + GOOD.encode(), "more than one"),
        (HEADER.encode() + b'\n"a"b', "not CSV"),
    ],
)  # fmt: skip
def test_files_that_are_no_manifest(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=named):
        Manifest.read(path)
    with pytest.raises(UsageError, match="No such file"):
        Manifest.read(tmp_path / "none.csv")


def test_paths_below_the_folder_move_with_it(tmp_path: Path) -> None:
    elsewhere, url = str(tmp_path.parent / "else.wav"), "s3://bucket/b.mp4"
    rows = (
        clip_row("a", path=str(tmp_path / "x" / "a.mp4"), audio_path=elsewhere),
        clip_row("b", path=url, audio_path="", audio_fps=0, extra={"truth": "b.json"}),
    )
    first = tmp_path / "m.csv"
    Manifest(rows).write(first)
    cells = list(csv.DictReader(first.read_text().splitlines()))
    assert (cells[0]["path"], cells[0]["audio_path"], cells[1]["path"]) == (os.path.join("x", "a.mp4"), elsewhere, url)
    assert cells[0]["truth"] == "" and cells[1]["truth"] == "b.json"
    moved = tmp_path / "moved"
    moved.mkdir()
    os.replace(first, moved / "m.csv")
    assert Manifest.read(moved / "m.csv")[0].path == str(moved / "x" / "a.mp4")


def test_writing_fails_without_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.csv"
    Manifest((clip_row(),)).write(path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        Manifest((clip_row("other"),)).write(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.csv"]


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=30)


@given(
    texts, texts, st.floats(1e-3, 1e3), st.integers(1, 10**9), st.integers(1, 10**5),
)  # fmt: skip
def test_what_is_written_is_read_again(text: str, note: str, fps: float, frames: int, height: int) -> None:
    import tempfile

    row = clip_row("a", text=text, fps=fps, num_frames=frames, height=height, extra={"note": note})
    with tempfile.TemporaryDirectory() as folder:
        Manifest((row,)).write(Path(folder) / "m.csv")
        assert Manifest.read(Path(folder) / "m.csv").rows == (row,)
