"""What clips to make: one request, or the rows of a CSV file, checked as far as that needs no model."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from javis.errors import UsageError

MAX_PROMPT, MAX_STEPS, MAX_SEED, MAX_ROWS = 1000, 1000, 2**63 - 1, 100_000
MAX_BEST_OF = 64
EXAMPLE = "such as 'a red ball bounces on the left'"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class ClipRequest:
    """One clip to make. ``stem`` is the file name without suffix; ``line`` the CSV line, for messages."""

    stem: str
    prompt: str
    seed: int
    steps: int | None = None
    seconds: float | None = None
    line: int | None = None
    audio_seed: int | None = None


def slug(prompt: str) -> str:
    """A file name from a prompt: lower-case ASCII words joined by "-", at most 60 characters, never empty."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "clip"


def check_request(request: ClipRequest) -> None:
    """Raise `UsageError` for what no checkpoint can make. The checkpoint's own limits are checked when it is loaded."""
    if not request.prompt.strip():
        raise UsageError(f"the prompt is empty; expected a text {EXAMPLE}")
    if not _is_text(request.prompt):
        raise UsageError(f"the prompt is not text in UTF-8; expected a text {EXAMPLE}")
    if len(request.prompt) > MAX_PROMPT:
        raise UsageError(f"prompt of {len(request.prompt)} characters; expected at most {MAX_PROMPT}")
    for name, seed in (("seed", request.seed), ("audio seed", request.audio_seed)):
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise UsageError(f"{name} {seed} is unusable; expected a whole number from 0 to {MAX_SEED}")
    if request.steps is not None and not 1 <= request.steps <= MAX_STEPS:
        raise UsageError(f"steps must be a whole number from 1 to {MAX_STEPS}, got {request.steps}")
    if request.seconds is not None and not (math.isfinite(request.seconds) and request.seconds > 0):
        raise UsageError(f"seconds must be a number above 0, got {request.seconds}")


class Fault(NamedTuple):
    """Why a row of a CSV file makes no clip."""

    line: int
    message: str


class Table(NamedTuple):
    """The rows of a CSV file: what to make, and what is unusable."""

    requests: list[ClipRequest]
    faults: list[Fault]


def _is_text(text: str) -> bool:
    """False for bytes that are no UTF-8, which Python has smuggled into ``text`` as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_requests(
    path: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    seconds: float | None = None,
    audio_seed: int | None = None,
) -> Table:
    """Read the rows of a CSV file; the other arguments stand in for cells that are absent or empty.

    Raises:
        UsageError: not a readable CSV file, or no row of it is usable. The message names the lines.
    """
    rows = read_rows(path)
    requests: list[ClipRequest] = []
    faults: list[Fault] = []
    stems: dict[str, int] = {}
    for number, (line, row) in enumerate(rows):
        try:
            if isinstance(row, str):
                raise UsageError(row)
            request = _request(row, number, line, seed=seed, steps=steps, seconds=seconds, audio_seed=audio_seed)
            check_request(request)
            earlier = stems.setdefault(request.stem.lower(), line)
            if earlier != line:
                raise UsageError(f"id {request.stem!r} is already on line {earlier}")
            requests.append(request)
        except UsageError as error:
            faults.append(Fault(line, str(error)))
    if not rows:
        raise UsageError(f"{path} has no rows; expected a header with 'prompt' or 'text' and a row for each clip")
    if not requests:
        raise UsageError(f"{path}: {list_faults(faults)}; nothing was generated")
    return Table(requests, faults)


def list_faults(faults: Sequence[Fault]) -> str:
    """A part of one line about all unusable rows."""
    shown = "; ".join(f"line {line}: {message[:300]}" for line, message in faults[:5])
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return f"{len(faults)} unusable row{'s' * (len(faults) > 1)}: {shown}{more}"


def read_rows(path: Path) -> list[tuple[int, Mapping[str, str] | str]]:
    """Line numbers and cells by lower-case column name, or what is wrong with the row.

    "prompt" stands for either name of that column.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")  # a bad byte spoils its row only
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; expected a CSV file") from None
    if "\0" in text:
        raise UsageError(f"{path} holds zero bytes; expected a CSV file with a column 'prompt' or 'text'")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, Mapping[str, str] | str]] = []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        names = [name for name in header if name in ("prompt", "text")]
        if len(names) != 1:
            found = f"has {' and '.join(names)}" if names else "has neither"
            raise UsageError(f"{path} needs one column 'prompt' or 'text' in its first line; it {found}")
        doubled = sorted({name for name in header if name and header.count(name) > 1})
        if doubled:
            raise UsageError(f"{path} has more than one column {', '.join(doubled)[:100]!r}; keep one of each")
        header[header.index(names[0])] = "prompt"
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            row: Mapping[str, str] | str = dict(zip(header, cells, strict=False))
            if len(cells) > len(header):
                row = f"{len(cells)} cells under {len(header)} columns; put a prompt with a comma in double quotes"
            if not all(map(_is_text, cells)):
                row = "the row is not text in UTF-8; save the file in UTF-8"
            rows.append((reader.line_num, row))
            if len(rows) > MAX_ROWS:
                raise UsageError(f"{path} has more than {MAX_ROWS} rows; split it")
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num} is not CSV: {error}; expected comma-separated rows") from None
    return rows


def _request(
    row: Mapping[str, str],
    number: int,
    line: int,
    *,
    seed: int,
    steps: int | None,
    seconds: float | None,
    audio_seed: int | None,
) -> ClipRequest:
    def cell(name: str) -> str:
        return row.get(name, "").strip()

    def convert(name: str, kind: type[int] | type[float], kind_name: str) -> Any:
        try:
            return kind(cell(name)[:400])
        except ValueError:
            raise UsageError(f"{name} {cell(name)[:40]!r} is not {kind_name}") from None

    prompt, stem = cell("prompt"), cell("id")
    if stem and not _ID.fullmatch(stem):
        raise UsageError(f"id {stem[:40]!r} is not a file name of at most 100 letters, digits, '.', '_' or '-'")
    return ClipRequest(
        stem=stem or f"{number + 1:04d}-{slug(prompt)}",
        prompt=prompt,
        seed=convert("seed", int, "a whole number") if cell("seed") else seed + number,
        steps=convert("steps", int, "a whole number") if cell("steps") else steps,
        seconds=convert("seconds", float, "a number") if cell("seconds") else seconds,
        line=line,
        audio_seed=convert("audio_seed", int, "a whole number")
        if cell("audio_seed")
        else None
        if audio_seed is None
        else audio_seed + number,
    )
