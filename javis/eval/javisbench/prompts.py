"""The prompts of a benchmark, from a CSV file with the official columns.

| column | meaning |
|---|---|
| text | the prompt; the one column that must be there |
| audio_text, video_text | what is heard, what is seen; ``text`` where they are absent or empty |
| id | name of the sample's file, without suffix; must not occur twice |
| path, audio_path | the real clip, for distances to real clips |
| cat0_ind .. cat4_ind | numbers of categories, joined by commas (taxonomy.py) |

Others are ignored. A row that is unusable is named and left out; its number stays taken, because official samples and
cached features are numbered by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from javis.errors import UsageError
from javis.eval.javisbench.taxonomy import Taxonomy, column
from javis.requests import read_rows, slug


@dataclass(frozen=True)
class Prompt:
    """One prompt. ``categories`` holds, for each aspect, the numbers of its categories (none if unknown)."""

    number: int  # place among the rows of the file, from 0
    name: str  # id if there is one, else the name that `javis sample --prompts` gives the clip
    text: str
    audio_text: str
    video_text: str
    categories: tuple[tuple[int, ...], ...]
    path: str | None = None  # of the real clip, as the file says it
    audio_path: str | None = None


@dataclass
class Problems:
    """What is wrong, by kind: which names, and why. Everything else is evaluated."""

    found: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, kind: str, name: str, reason: str = "") -> None:
        self.found.setdefault(kind, {})[name] = reason

    def json(self) -> dict[str, dict[str, object]]:
        """``{kind: {"count": .., "names": {name: reason}}}``."""
        return {kind: {"count": len(names), "names": names} for kind, names in sorted(self.found.items())}


@dataclass(frozen=True)
class PromptTable:
    """The prompts of a file, and how many rows it has, usable or not."""

    prompts: tuple[Prompt, ...]
    rows: int


def read_prompts(path: Path, taxonomy: Taxonomy, problems: Problems) -> PromptTable:
    """Prompts of a CSV file; what is wrong with it goes to ``problems``.

    Raises:
        UsageError: not a CSV file with a column "text" (or "prompt"), or no usable row in it.
    """
    rows = read_rows(path)
    seen_columns = {name for _, row in rows if not isinstance(row, str) for name in row}
    for number, aspect in enumerate(taxonomy):
        if rows and column(number) not in seen_columns:
            problems.add("missing column", column(number), f"no table for {aspect.name}")
    if rows and "audio_text" not in seen_columns:
        problems.add("missing column", "audio_text", "the whole text stands for what is heard")
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for number, (line, row) in enumerate(rows):
        if isinstance(row, str):
            problems.add("unusable row", f"line {line}", row)
            continue
        text = row.get("prompt", "").strip()
        name = row.get("id", "").strip() or f"{number + 1:04d}-{slug(text)}"
        if not text:
            problems.add("unusable row", f"line {line}", "the text is empty")
            continue
        earlier = lines.setdefault(name, line)
        if earlier != line:
            problems.add("duplicate id", f"{name} (line {line})", f"already on line {earlier}, which is kept")
            continue
        prompts.append(
            Prompt(
                number,
                name,
                text,
                row.get("audio_text", "").strip() or text,
                row.get("video_text", "").strip() or text,
                _categories(row, taxonomy, line, problems),
                row.get("path", "").strip() or None,
                row.get("audio_path", "").strip() or None,
            )
        )
    if not prompts:
        raise UsageError(f"{path} has no usable row; expected a header with 'text' and a row for each prompt")
    return PromptTable(tuple(prompts), len(rows))


def _categories(
    row: Mapping[str, str], taxonomy: Taxonomy, line: int, problems: Problems
) -> tuple[tuple[int, ...], ...]:
    found = []
    for number, aspect in enumerate(taxonomy):
        chosen: list[int] = []
        for word in row.get(column(number), "").split(","):
            word = word.strip().removesuffix(".0")  # pandas writes whole numbers so where a cell of the column is empty
            if not word:
                continue
            if word.isdecimal() and int(word) < len(aspect.categories):
                chosen.append(int(word))
            else:
                limit = len(aspect.categories) - 1
                problems.add(
                    "unknown category", f"line {line}: {column(number)}", f"{word[:40]!r}, expected 0 to {limit}"
                )
        found.append(tuple(dict.fromkeys(chosen)))
    return tuple(found)
