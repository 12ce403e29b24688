"""(c) The audit of negatives (`javis eval negatives`, docs/negatives.md) as one of the experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from javis.eval.experiments.common import Context, Row, bars, listed, needed, save_figure, table
from javis.eval.negatives import BAR

TITLE = "Negative audit"
COUNT = 200


def run(context: Context) -> dict[str, Any]:
    """``context.count`` audited clips, and as many true ones that set the margins."""
    from javis.eval.negatives_command import EvalNegativesArgs, measured

    name = needed(context.prior_checkpoint)
    report = measured(EvalNegativesArgs(checkpoint=name, count=context.count, calibration=context.count))
    return {key: report[key] for key in ("before", "after", "bar", "below_bar")}


def section(row: Row) -> str:
    """Table and finding."""
    before, after = row["before"]["kinds"], row["after"]["kinds"]
    cells = [
        [kind, _rate(before[kind]["discriminator"]), _rate(rates["discriminator"])]
        + [_rate(before[kind]["hinge"]), _rate(rates["hinge"])]
        for kind, rates in after.items()
    ]
    true = row["after"]["synchronous"]["discriminator"]
    low = listed(row["below_bar"]) or "none"
    return (
        f"{row['count']} clips with one negative of every kind; share called asynchronous by the discriminator (margin "
        f"from {row['count']} other true clips) and by the hinge (farther from the prior than the true pair), with "
        "random weights and after `javis train prior`. What the words mean: [negatives.md](negatives.md).\n\n"
        + table(["kind", "discriminator before", "discriminator", "hinge before", "hinge"], cells)
        + f"\n- True clips called synchronous by the discriminator: {_rate(true)}.\n- Below {BAR}: {low}.\n"
    )


def _rate(rate: Row) -> str:
    return f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"


def plot(row: Row, path: Path) -> None:
    """Shares by kind, before and after."""
    from matplotlib.figure import Figure as Sheet

    names = list(row["after"]["kinds"])
    sheet = Sheet(figsize=(13, 7), layout="constrained")
    panels = [(when, how) for when in ("before", "after") for how in ("discriminator", "hinge")]
    for axes, (when, how) in zip(sheet.subplots(2, 2, sharex=True).flat, panels, strict=True):
        rates = [row[when]["kinds"][name][how] for name in names]
        bars(axes, names, [{**rate, "value": rate["rate"]} for rate in rates], f"{how}, {when} training", BAR)
    save_figure(sheet, path)
