"""Joint stage with the branches frozen (as in the paper) or not: validation loss after a few steps from the same start.

    python benchmarks/freezing.py --run runs/demo [--steps 150]

Needs the first two stages of `javis train demo`. Appends two rows to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from rich.console import Console

from javis.bench import append_rows, environment
from javis.train.config import DemoTrainConfig, StageConfig
from javis.train.prior_stage import run_prior_stage
from javis.train.stages import launch_flow_stage


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the stages are, and how long to train."""

    run: Path = Path("runs/demo")
    steps: int = 150
    batch: int = 8


def main(args: Args) -> None:
    rows = []
    for frozen in (False, True):
        with TemporaryDirectory() as folder:
            out = Path(folder)
            for name in ("train", "validation", "branches"):
                (out / name).symlink_to((args.run / name).resolve())
            shutil.copytree(args.run / "prior", out / "prior")
            config = replace(
                DemoTrainConfig(),
                out=out,
                processes=1,
                batch=args.batch,
                freeze_branches=frozen,
                joint=StageConfig(steps=args.steps, warmup=30, decay=0.5),
                ema=0.9,  # the average of so short a run
                save_every=args.steps,
            )
            prior = run_prior_stage(replace(config, prior=StageConfig(steps=0)))
            launch_flow_stage("joint", config, prior, out / "branches")
            lines = [json.loads(line) for line in (out / "joint" / "log.jsonl").read_text().splitlines()]
        total, video, audio = next(line["validation"] for line in lines if "validation" in line)
        losses = {"validation": total, "video": video, "audio": audio}
        rows.append({"bench": "freezing", "frozen": frozen, "steps": args.steps, "batch": args.batch, **losses})
        Console().print(rows[-1])
    append_rows([{**row, **environment()} for row in rows])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Args))
