"""The section of docs/benchmarks.md on JavisBench, from rows of ``javis eval javisbench``; see tables.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Table = Callable[[Sequence[str], list[list[object]]], str]


def javisbench_section(rows: list[Row], table: Table, where: Callable[[Row], str]) -> str:
    """Figures of the newest row of each name, and its categories.

    Args:
        rows: of kind ``eval_javisbench``, oldest first.
        table: makes a markdown table of a header and cells.
        where: device, versions and commit of a row.
    """
    from javis.eval.javisbench.text import by_aspect, in_categories, interval, number, value_of

    newest = {row["name"]: row for row in rows}
    text = ""
    for name, row in newest.items():
        fingerprint = row["fingerprint"]
        text += (
            f"\n## JavisBench: {name}\n\n`javis eval javisbench`; {row['evaluated']} of {row['asked']} samples, "
            f"{fingerprint['size']} at {fingerprint['fps']} fps, protocol {fingerprint['protocol']}, fingerprint "
            f"{fingerprint['id']}; {where(row)}. Skipped, for want of weights: "
            f"{', '.join(row['skipped']) or 'none'}. † fewer clips than dimensions. What is measured: "
            "[javisbench.md](javisbench.md).\n\n"
        )
        cells: list[list[object]] = []
        for metric, figure in row["figures"].items():
            corrected = figure.get("corrected")
            cells.append(
                [
                    f"{figure['label']} ({figure['better']})",
                    value_of(figure, metric),
                    None if corrected is None else number(corrected, metric),
                    interval(figure, metric) or None,
                    None if figure["shuffled"] is None else number(figure["shuffled"], metric),
                    figure["n"],
                ]
            )
        text += table(["metric (better)", "value", "without bias", "95 %", "shuffled", "clips"], cells)
        names = in_categories(row)
        if names:
            cells = [
                [aspect, category, max(figure["n"] for figure in found.values())]
                + [value_of(found[metric], metric) if metric in found else None for metric in names]
                for aspect, categories in by_aspect(row).items()
                for category, found in categories.items()
            ]
            text += "\n" + table(["aspect", "category", "clips", *(row["figures"][m]["label"] for m in names)], cells)
    return text
