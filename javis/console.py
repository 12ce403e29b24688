"""How the commands speak: plain lines on stdout, a progress bar and single-line errors on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def output(*, stderr: bool = False) -> Console:
    """A console that prints what it is given: no wrapping, no colour guesses, no markup."""
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False, emoji=False, markup=False)


def one_line(text: str, limit: int = 2000) -> str:
    """``text`` as one printable line: white space joined, control characters replaced, cut to ``limit``."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


@contextlib.contextmanager
def progress_bar(label: str, total: int, *, hidden: bool = False) -> Iterator[Callable[[float], None]]:
    """A bar on stderr if that is a terminal and not ``hidden``; yields a function of how many of ``total`` are done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    count = [MofNCompleteColumn()] if total > 1 else []
    columns = [TextColumn(label), BarColumn(), *count, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
