"""What to evaluate, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from javis.eval.javisbench.layouts import DataSet
from javis.eval.javisbench.measure import Options

Layout = Literal["prompts"] | DataSet
Progress = Callable[[int, int], None]  # (clips done, of)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One evaluation; the command has an option for each (command.py says what they mean)."""

    samples: Path
    out: Path
    prompts: Path | None = None
    layout: Layout = "prompts"
    reference: Path | None = None
    categories: Path | None = None
    options: Options = field(default_factory=Options)
    metrics: tuple[str, ...] = ()  # all if empty
    processes: int = 1
    timeout: float = 600.0
    name: str = "samples"
