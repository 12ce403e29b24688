"""The section of docs/benchmarks.md about feeding, from the rows of `benchmarks.feeding`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def feeding_sections(
    rows: list[Row],
    table: Callable[[Sequence[str], Iterable[Sequence[object]]], str],
    where: Callable[[Row], str],
) -> str:
    """Clips per second: the newest row of each clip, codec and feeder, a table for each device."""
    newest = {(r["device"], r["clip"], r["codec"], r["feeder"], r["decode_device"]): r for r in rows}
    text = ""
    for device in dict.fromkeys(device for device, *_ in newest):
        mine = [r for (of, *_), r in newest.items() if of == device]
        cells = [
            [r["clip"], r["frames"], r["codec"], r["feeder"], r["decode_device"], r["workers"], r["load"]]
            + [r[f"clips_per_s_{p}"] for p in ("p20", "p50", "p80")]
            for r in mine
        ]
        header = ["clip", "frames", "codec", "feeder", "device", "workers", "load", "p20", "p50", "p80"]
        about = "clips per second from files to batches, the feeders in turns (docs/data.md); load: others at work too"
        text += f"\n## Feeding\n\n`python -m benchmarks.feeding`: {about}; {where(mine[-1])}.\n\n" + table(
            header, cells
        )
    return text
