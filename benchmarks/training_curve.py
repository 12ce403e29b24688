"""Plot the losses of a `javis train demo` run.

python benchmarks/training_curve.py [--logs benchmarks/results/logs] [--out docs/img/training.png]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the logs are and where the picture goes."""

    logs: Path = ROOT / "benchmarks" / "results" / "logs"
    out: Path = ROOT / "docs" / "img" / "training.png"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(args: Args) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), dpi=100)
    joint = read(args.logs / "train_demo_joint.jsonl")
    losses = [row for row in joint if "loss" in row]
    held = [row for row in joint if "validation" in row]
    for i, name in enumerate(("video", "audio")):
        (line,) = axes[0].plot([r["step"] for r in losses], [r[name] for r in losses], label=name, lw=0.8)
        values = [r["validation"][1 + i] for r in held]
        axes[0].plot([r["step"] for r in held], values, "o--", ms=3, color=line.get_color(), label=f"{name}, held out")
    axes[0].set(title="joint stage", xlabel="step", ylabel="velocity loss", yscale="log")
    prior = read(args.logs / "train_demo_prior.jsonl")
    for name in ("spatial_token_loss", "temporal_token_loss", "spatial_disc_loss", "temporal_disc_loss"):
        axes[1].plot([r["step"] for r in prior], [r[name] for r in prior], label=name.replace("_", " "), lw=0.8)
    axes[1].set(title="prior stage", xlabel="step")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args))
