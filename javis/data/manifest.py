"""The list of clips of a data set: a CSV file with the columns that the official code reads.

Read in this order: `ClipRow`, `Manifest`, `parse_manifest` (which names the rows that are unusable).
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, overload

from javis.data.places import is_url, open_bytes
from javis.errors import UsageError

# In this order in the files. Where a name is absent here it is kept as an extra column.
COLUMNS = (
    "path", "id", "relpath", "num_frames", "height", "width", "aspect_ratio", "fps", "resolution", "audio_path",
    "audio_fps", "text",
)  # fmt: skip

SIDE_COLUMN = "side"  # extra column: the json beside the clip, relative to the folder of the video


@dataclass(frozen=True)
class ClipRow:
    """One clip. ``path`` and ``audio_path`` are absolute, or URLs; no sound of any kind: ``audio_path`` is empty.

    Attributes:
        path: the video file. id: its name in messages and in the data set. relpath: its place below the data set.
        num_frames: of the video. height, width: in pixels. aspect_ratio: height / width. fps: frames per second.
        resolution: height * width.
        audio_path: file with the sound; ``path`` itself if the video file holds it.
        audio_fps: sample rate of the sound in Hz, 0 without sound.
        text: the caption.
        extra: further columns of the CSV file, as they stand.
    """

    path: str
    id: str
    relpath: str
    num_frames: int
    height: int
    width: int
    aspect_ratio: float
    fps: float
    resolution: int
    audio_path: str
    audio_fps: int
    text: str
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return self.num_frames / self.fps


class ClipMedia(NamedTuple):
    """The bytes of a clip's files. ``audio`` is None where the video file holds the sound, or nothing does."""

    video: bytes
    audio: bytes | None
    side: bytes | None  # the json beside the clip


class BrokenRow(NamedTuple):
    """A row that is no clip: its line in the file (the header is line 1), its cells, and what is wrong."""

    line: int
    cells: dict[str, str]
    message: str


class ParsedManifest(NamedTuple):
    """A manifest file as it is: usable rows with their lines, and broken ones."""

    rows: tuple[ClipRow, ...]
    lines: tuple[int, ...]
    broken: tuple[BrokenRow, ...]
    extra_columns: tuple[str, ...]


@dataclass(frozen=True)
class Manifest(Sequence[ClipRow]):
    """The clips of a data set, in the order of the file."""

    rows: tuple[ClipRow, ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read a CSV file; relative paths are taken from its folder.

        Raises:
            UsageError: no such file, no CSV, a column is missing, a row is broken (its line is named), no row at all.
        """
        parsed = parse_manifest(path)
        if parsed.broken:
            shown = "; ".join(f"line {row.line}: {row.message}" for row in parsed.broken[:5])
            more = f"; and {len(parsed.broken) - 5} more" if len(parsed.broken) > 5 else ""
            rows = f"{len(parsed.broken)} broken row{'s' * (len(parsed.broken) > 1)}"
            raise UsageError(f"{path} has {rows}: {shown}{more}; 'javis data check' writes a manifest without them")
        if not parsed.rows:
            raise UsageError(f"{path} has no rows; expected a row for each clip below the header")
        return cls(parsed.rows)

    def media(self, index: int) -> ClipMedia:
        """The bytes of a clip, from files, URLs or (`javis.data.shards.ShardedManifest`) shards.

        Raises:
            OSError: a file is not there. UsageError: a URL that cannot be opened.
        """

        def read(path: str) -> bytes:
            with open_bytes(path) as file:
                return bytes(file.read())

        row = self.rows[index]
        side = side_path(row)
        audio = read(row.audio_path) if row.audio_path not in ("", row.path) else None
        return ClipMedia(read(row.path), audio, side.read_bytes() if side is not None and side.is_file() else None)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file, all or nothing. Paths below its folder are written relative to it.

        Raises:
            UsageError: ``path`` cannot be written.
        """
        from javis.media import atomic_file

        with atomic_file(path) as temporary:
            temporary.write_text(self.to_csv(Path(path).absolute().parent), encoding="utf-8")

    def to_csv(self, folder: Path | None = None) -> str:
        """The text of the CSV file; paths below ``folder`` are relative to it."""
        extras = list(dict.fromkeys(name for row in self.rows for name in row.extra))
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow([*COLUMNS, *extras])
        for row in self.rows:
            own = replace(row, path=_relative(row.path, folder), audio_path=_relative(row.audio_path, folder))
            cells = [getattr(own, name) for name in COLUMNS]
            table.writerow([*map(_cell, cells), *(row.extra.get(name, "") for name in extras)])
        return text.getvalue()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ClipRow]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> ClipRow: ...
    @overload
    def __getitem__(self, index: slice) -> Manifest: ...
    def __getitem__(self, index: int | slice) -> ClipRow | Manifest:
        return Manifest(self.rows[index]) if isinstance(index, slice) else self.rows[index]


def side_path(row: ClipRow, column: str = SIDE_COLUMN) -> Path | None:
    """The file that an extra column of a row names, below the folder of its video; None: none.

    `javis world make` writes the truth of a clip there.
    """
    name = row.extra.get(column, "")
    return Path(row.path).parent / name if name and not is_url(row.path) else None


def parse_manifest(path: str | os.PathLike[str]) -> ParsedManifest:
    """Every row of a CSV manifest, the broken ones too. Reads no media file.

    Raises:
        UsageError: no such file, no CSV, a column is missing or doubled.
    """
    source = Path(path)
    text = _read_text(source)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[ClipRow] = []
    lines: list[int] = []
    broken: list[BrokenRow] = []
    folder = source.absolute().parent
    try:
        header = _header(source, next(reader, []))
        start = reader.line_num + 1  # of the row to come; a quoted cell may hold line breaks
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            named = dict(zip(header, cells, strict=False))
            try:
                if len(cells) != len(header):
                    raise UsageError(f"{len(cells)} cells under {len(header)} columns; quote a text with a comma")
                rows.append(_row(named, folder))
                lines.append(line)
            except UsageError as error:
                broken.append(BrokenRow(line, named, str(error)))
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num} is not CSV: {error}; expected comma-separated rows") from None
    extras = tuple(name for name in header if name not in COLUMNS)
    return ParsedManifest(tuple(rows), tuple(lines), tuple(broken), extras)


def resolve(path: str, folder: Path) -> str:
    """``path`` as it stands if it is empty, absolute or a URL; else below ``folder``."""
    return path if not path or is_url(path) or os.path.isabs(path) else os.path.normpath(folder / path)


def _relative(path: str, folder: Path | None) -> str:
    if folder is None or not path or is_url(path):
        return path
    root = os.path.normpath(folder)
    below = os.path.relpath(path, root) if os.path.isabs(path) else path
    return path if below == ".." or below.startswith(".." + os.sep) else below


def _cell(value: object) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)


def _read_text(source: Path) -> str:
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}; expected a CSV manifest") from None
    except UnicodeDecodeError as error:
        line = source.read_bytes()[: error.start].count(b"\n") + 1
        raise UsageError(f"{source} line {line} is not UTF-8; save the file in UTF-8") from None
    if "\0" in text:
        raise UsageError(f"{source} holds zero bytes; expected a CSV manifest")
    return text


def _header(source: Path, cells: Iterable[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise UsageError(
            f"{source}: column{'s' * (len(missing) > 1)} {', '.join(missing)} missing; expected {', '.join(COLUMNS)} "
            "('javis data make' writes them all)"
        )
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise UsageError(f"{source} has more than one column {', '.join(doubled)[:100]!r}; keep one of each")
    return header


def _row(cells: Mapping[str, str], folder: Path) -> ClipRow:
    def number(name: str, least: float, *, whole: bool) -> float:
        text = cells[name].strip()
        try:
            value = float(text)  # other programs write whole numbers as 51.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (whole and not value.is_integer()):
            kind = "a whole number" if whole else "a number"
            bound = f"of at least {least:g}" if whole else "above 0"
            raise UsageError(f"{name} is {text[:40]!r}, expected {kind} {bound}")
        return value

    path, identity = cells["path"].strip(), cells["id"].strip()
    if not path or not identity:
        raise UsageError(f"{'path' if not path else 'id'} is empty")
    audio_path = cells["audio_path"].strip()
    without_sound = not audio_path and not cells["audio_fps"].strip()
    tiny = math.ulp(0.0)
    return ClipRow(
        path=resolve(path, folder),
        id=identity,
        relpath=cells["relpath"].strip(),
        num_frames=int(number("num_frames", 1, whole=True)),
        height=int(number("height", 1, whole=True)),
        width=int(number("width", 1, whole=True)),
        aspect_ratio=number("aspect_ratio", tiny, whole=False),
        fps=number("fps", tiny, whole=False),
        resolution=int(number("resolution", 1, whole=True)),
        audio_path=resolve(audio_path, folder),
        audio_fps=0 if without_sound else int(number("audio_fps", 0 if not audio_path else 1, whole=True)),
        text=cells["text"],
        extra={name: value for name, value in cells.items() if name not in COLUMNS},
    )
