"""Write javis/kernels/choices.json from the rows in benchmarks/results/*.jsonl: which backend ``auto`` tries first.

    python -m benchmarks.choices                # write the table
    python -m benchmarks.choices --check        # 1 if the table is not what the rows say

A row of `javis bench kernels` names its class of device and its bucket of calls. For each the newest measurement of
every case counts; where two cases share a bucket, the backends are ranked by their mean slowness over both. A backend
that is at most 3 % slower than the fastest and comes first in the op's own order stays first: noise decides nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import read_rows
from javis.kernels.backend import Backend
from javis.kernels.choices import FORMAT, TABLE, parse
from javis.kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
CLOSE = 1.03  # slower by less is not slower
# Inference is measured by the forward pass, training by both: a backward pass alone is never run.
MODES = {"inference": "forward", "training": "forward+backward"}
Row = dict[str, Any]


def usable(row: Row) -> bool:
    """Whether a row speaks for a backend in a bucket (rows of other benchmarks and of earlier versions do not)."""
    if not {"op", "bucket", "device_class", "backend", "mode", "p50_ms"} <= row.keys() or row["op"] not in OPS:
        return False
    kind = str(row["bucket"]).partition(" ")[0]
    return MODES.get(kind) == row["mode"] and row["backend"] in {b.value for b in OPS[row["op"]].checks}


def runs(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, dict[str, float]]]:
    """By class, op and bucket: for each case the milliseconds by backend of its newest run.

    Backends of one run took turns, so their times compare; those of two runs do not. A run begins where a backend comes
    again, or the commit or the load differs.
    """
    found: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    last: dict[tuple[str, str, str, str], tuple[Any, ...]] = {}
    for row in rows:
        if not usable(row):
            continue
        key, case = (row["device_class"], row["op"], row["bucket"]), row["case"]
        run = tuple(row.get(name) for name in ("device", "commit", "date", "load", "threads"))
        times = found.setdefault(key, {}).setdefault(case, {})
        if last.get((*key, case)) != run or row["backend"] in times:
            times.clear()
        last[(*key, case)] = run
        times[row["backend"]] = row["p50_ms"]
    return found


def rank(cases: Sequence[dict[str, float]], default: Sequence[Backend]) -> list[str]:
    """Backends fastest first, those that every case has."""
    common = [b.value for b in default if all(b.value in times for times in cases)]
    slowness = {
        name: math.exp(sum(math.log(times[name] / min(times[n] for n in common)) for times in cases) / len(cases))
        for name in common
    }
    order: list[str] = []
    while common:
        fastest = min(slowness[name] for name in common)
        order.append(next(name for name in common if slowness[name] <= CLOSE * fastest))
        common.remove(order[-1])
    return order


def make(rows: Iterable[Row]) -> dict[str, Any]:
    """The table of these rows (oldest first). A single backend is no choice, so it makes no entry."""
    measured: dict[str, dict[str, dict[str, list[str]]]] = {}
    for (kind, op, bucket), cases in sorted(runs(rows).items()):
        order = rank(list(cases.values()), list(OPS[op].checks))
        if len(order) > 1:
            measured.setdefault(kind, {}).setdefault(op, {})[bucket] = order
    return {"format": FORMAT, "measured": measured}


def written(table: dict[str, Any]) -> str:
    """The text of the file: one bucket a line."""
    text = json.dumps(table, indent=1, sort_keys=True)
    # json puts every name on a line of its own; an order reads better on one.
    return "".join(_join(text.split("\n"))) + "\n"


def _join(lines: Sequence[str]) -> Iterable[str]:
    inside = False
    for number, line in enumerate(lines):
        start = "" if number == 0 or inside else "\n"
        inside = (inside or line.endswith("[")) and not line.strip().startswith("]")
        part = line if start or number == 0 else line.strip()
        yield start + part + (" " if inside and part.endswith(",") else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 written or up to date, 1 out of date (with --check)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of *.jsonl")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the table is up to date")
    args = parser.parse_args(arguments)
    table = make(read_rows(args.results))
    text = written(table)
    parse(text, str(args.out))
    entries = sum(len(buckets) for ops in table["measured"].values() for buckets in ops.values())
    if args.check:
        same = args.out.is_file() and args.out.read_text(encoding="utf-8") == text
        print(f"{args.out}: {'as' if same else 'not what'} the rows say ({entries} entries)")
        return 0 if same else 1
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {entries} entries")
    for kind, ops in table["measured"].items():
        for op, buckets in ops.items():
            default = [b.value for b in OPS[op].checks]
            other = [key for key, order in buckets.items() if order != [name for name in default if name in order]]
            print(f"  {kind:14} {op:36} {len(buckets)} measured, {len(other)} differ from the op's own order")
    return 0


if __name__ == "__main__":
    sys.exit(main())
