"""The section of docs/benchmarks.md about a training step, from the rows of `benchmarks.train_stages`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def train_sections(
    rows: list[Row],
    table: Callable[[Sequence[str], Iterable[Sequence[object]]], str],
    where: Callable[[Row], str],
) -> str:
    """The newest row of each stage, variant, dtype and size, a table for each device."""
    keys = ("device", "stage", "variant", "dtype", "train", "depth", "batch", "frames", "height", "width")
    newest = {tuple(row[key] for key in keys): row for row in rows}
    text = ""
    for device in dict.fromkeys(key[0] for key in newest):
        mine = [row for key, row in newest.items() if key[0] == device]
        cells = [
            [r["stage"], r["variant"], r["dtype"], r["train"], r["depth"], r["tokens"], r["s_p50"], r["tokens_per_s"]]
            + [r.get("times_eager_tokens_per_s", "-"), r["memory_gb"], r.get("memory_of_eager", "-")]
            for r in mine
        ]
        header = [
            "stage",
            "variant",
            "dtype",
            "trained",
            "layers",
            "tokens",
            "s",
            "tokens/s",
            "of eager",
            "GB",
            "of eager",
        ]
        about = (
            "one training step of each stage at full width: forward, backward, optimizer, in turns "
            f"(docs/training.md); memory is {mine[-1]['memory']}"
        )
        text += f"\n## Training step\n\n`python -m benchmarks.train_stages`: {about}; {where(mine[-1])}.\n\n"
        text += table(header, cells)
    return text
