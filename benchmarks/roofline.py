"""Draw docs/roofline.png from the rows in benchmarks/results/*.jsonl: how near each op comes to what the machine gives.

    python -m benchmarks.roofline [--device NAME] [--dtype float32] [--out docs/roofline.png]

Across: FLOPs per byte of the call (javis/kernels/ops/<op>/cases.py). Up: TFLOP/s, from the median time. The two lines
are the copy and the matrix product that were timed in the same runs; what leaves the caches lies below them. (Rows of
an earlier version have no matrix product: then there is no upper line.) One panel per device and dtype; for each call
the newest row, its fastest backend and, hollow, eager PyTorch. Calls of less than 1 MB are left out: they measure what
it costs to make a call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.tables import read_rows
from javis.kernels.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
_COPY, _MATMUL, _EAGER = "copy", "matmul", "eager"
_LEAST_BYTES = 1e6
_NO_BACKEND = {_COPY, _MATMUL, _EAGER, "compiled eager", "reference"}


@cache
def work() -> dict[tuple[str, str], tuple[int, int]]:
    """FLOPs and bytes of the forward pass of every case, by op and name."""
    return {(name, case.name): (case.flops(), case.bytes()) for name, op in OPS.items() for case in op.cases()}


def panels(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Forward rows of today's cases by device and dtype, of each case and backend the newest."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if (row.get("op"), row.get("case")) in work() and row["mode"] == "forward":
            key = (row["device"], row["dtype"], row["threads"], row["op"], row["case"], row["backend"])
            newest[key] = row
    found: dict[tuple[str, str], list[Row]] = {}
    for (device, dtype, threads, *_), row in newest.items():
        cores = "" if row.get("cuda") else f", {threads} thread{'s' * (threads != 1)}"
        found.setdefault((f"{device}{cores}", dtype), []).append(row)
    return found


def peaks(rows: Sequence[Row]) -> tuple[float, float | None]:
    """Bytes and FLOPs per second of the copy and of the matrix product in these rows: the median over their runs.

    Copies that fit the caches are faster than memory: only those of calls that move 10 MB and more count, or, where
    there is none, the one that moves most. None: no matrix product was timed.
    """
    copies = [(row["gb_per_s"] * row["p50_ms"], row["gb_per_s"]) for row in rows if row["backend"] == _COPY]
    large = [speed for moved, speed in copies if moved >= 10]  # GB/s times ms is MB
    products = [row["tflop_per_s"] for row in rows if row["backend"] == _MATMUL]
    return median(large or [max(copies)[1]]) * 1e9, median(products) * 1e12 if products else None


def points(rows: Sequence[Row]) -> dict[str, list[tuple[float, float, str]]]:
    """By op: FLOPs per byte, TFLOP/s and backend of the fastest backend of each case, and of eager."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in rows):
        flops, moved = work()[op, case]
        if moved < _LEAST_BYTES or flops == 0:
            continue
        mine = [row for row in rows if (row["op"], row["case"]) == (op, case)]
        backends = [row for row in mine if row["backend"] not in _NO_BACKEND]
        drawn = [min(backends, key=lambda row: row["p50_ms"])] if backends else []
        for row in drawn + [row for row in mine if row["backend"] == _EAGER]:
            found.setdefault(op, []).append((flops / moved, flops / row["p50_ms"] / 1e9, row["backend"]))
    return found


def drawable(rows: Sequence[Row]) -> bool:
    """Whether the speed of memory was measured and there is something to draw."""
    return any(row["backend"] == _COPY for row in rows) and bool(points(rows))


def draw(found: dict[tuple[str, str], list[Row]], path: Path) -> None:
    """Write the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, len(found), figsize=(1 + 6.2 * len(found), 5.4), squeeze=False)
    for axes, ((device, dtype), rows) in zip(all_axes[0], found.items(), strict=True):
        bytes_per_s, flops_per_s = peaks(rows)
        shown = points(rows)
        xs = [x for values in shown.values() for x, _, _ in values]
        roofs = f"copy {bytes_per_s / 1e9:.3g} GB/s"
        if flops_per_s is None:
            low, high = min(xs) / 2, max(xs) * 2
            axes.plot([low, high], [low * bytes_per_s / 1e12, high * bytes_per_s / 1e12], color="black")
        else:
            ridge, roofs = flops_per_s / bytes_per_s, roofs + f", matrix product {flops_per_s / 1e12:.3g} TFLOP/s"
            low, high = min(*xs, ridge) / 2, max(*xs, ridge) * 4
            roof = [low * bytes_per_s / 1e12, flops_per_s / 1e12, flops_per_s / 1e12]
            axes.plot([low, ridge, high], roof, color="black")
        for number, (op, values) in enumerate(shown.items()):
            colour = f"C{number % 10}"
            mine = [(x, y) for x, y, backend in values if backend != _EAGER]
            eager = [(x, y) for x, y, backend in values if backend == _EAGER]
            axes.scatter(
                *zip(*(mine or [(float("nan"),) * 2])), color=colour, label=op, marker="o^sD"[number // 10], s=26
            )
            axes.scatter(*zip(*(eager or [(float("nan"),) * 2])), edgecolors=colour, facecolors="none", s=26)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs per byte of the call")
        axes.set_ylabel("TFLOP/s")
        axes.set_title(
            f"{device}\n{dtype}, forward; {roofs} in the same runs\nfilled: fastest backend, hollow: eager PyTorch",
            fontsize=8,
        )
        axes.grid(which="major", linewidth=0.3)
        axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 drawn, 1 nothing to draw, 2 a package is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of *.jsonl")
    parser.add_argument("--device", default="", help="only devices whose name contains this")
    parser.add_argument("--dtype", default="", help="only this dtype")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/roofline.png")
    args = parser.parse_args(arguments)
    found = {
        key: rows
        for key, rows in panels(read_rows(args.results)).items()
        if args.device.lower() in key[0].lower() and args.dtype in key[1] and drawable(rows)
    }
    if not found:
        print(
            "roofline: no rows of today's ops with a copy beside them; `javis bench kernels` makes them",
            file=sys.stderr,
        )
        return 1
    try:
        draw(found, args.out)
    except ImportError as error:
        print(f"roofline: {error}; pip install matplotlib", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {', '.join(f'{device} {dtype}' for device, dtype in found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
