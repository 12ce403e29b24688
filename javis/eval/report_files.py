"""Where evaluation commands leave their reports: ``--json FILE`` and ``--append FILE``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from javis.media import check_writable, write_text


def check_report_files(*paths: Path | None) -> None:
    """Before a measurement that takes minutes: raise `UsageError` unless each of ``paths`` can be made."""
    for path in paths:
        if path is not None:
            check_writable(path)


def write_report(
    report: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    json_file: Path | None = None,
    append: Path | None = None,
) -> None:
    """Write a report, or rows, to ``json_file`` as they are, and to ``append`` as one line each.

    Lines say device, versions and commit (:func:`javis.bench_environment.environment`) beside what the report itself
    says of them.
    """
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")
    if append is None:
        return
    from javis.bench_environment import environment

    where = environment()
    rows = [report] if isinstance(report, Mapping) else report
    with append.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **where, **row}) + "\n" for row in rows)
