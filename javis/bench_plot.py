"""The picture of ``javis bench kernels --plot``: how much faster than eager each backend is, case by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Baselines that set the scale or a peak, and are no backend.
_NOT_DRAWN = {"eager", "copy", "matmul"}


def plot_speedup(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with one bar per op, case, mode and backend: median time of eager over its own, on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    eager = {(r["op"], r["case"], r["mode"]): r["p50_ms"] for r in rows if r["backend"] == "eager"}
    drawn = [row for row in rows if row["backend"] not in _NOT_DRAWN and row["mode"] != "backward"]
    backends = list(dict.fromkeys(row["backend"] for row in drawn))
    labels = list(dict.fromkeys((row["op"], row["case"], row["mode"]) for row in drawn))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.22 * len(labels) * (len(backends) + 1)))
    thick = 0.8 / len(backends)
    for number, backend in enumerate(backends):
        mine = [row for row in drawn if row["backend"] == backend]
        places = [labels.index((r["op"], r["case"], r["mode"])) + (number + 0.5) * thick - 0.4 for r in mine]
        gains = [eager[r["op"], r["case"], r["mode"]] / r["p50_ms"] for r in mine]
        bars = axes.barh(places, gains, thick, label=backend)
        axes.bar_label(bars, labels=[f"{gain:.2f}" for gain in gains], padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as eager PyTorch (median)")
    axes.set_yticks(range(len(labels)), [f"{op}  {case}  {mode}" for op, case, mode in labels], fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    axes.set_title("{device}, {threads} threads, torch {torch}".format(**rows[0]), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
