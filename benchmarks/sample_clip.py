"""Seconds per stage of sampling one clip with the built-in model, medians over repeats.

    python benchmarks/sample_clip.py [--steps 16] [--repeats 5] [--threads 2]

Appends one row to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from rich.console import Console

from javis import JavisPipeline
from javis.bench import append_rows, environment


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to time."""

    prompt: str = "a red ball bounces on the left"
    steps: int | None = None  # default: the checkpoint's
    guidance: float | None = None  # default: the checkpoint's
    repeats: int = 5
    threads: int = 2


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    pipe = JavisPipeline.from_pretrained("demo")
    load = time.perf_counter() - started
    pipe(args.prompt, seed=0, steps=1)  # warm-up
    clips = [pipe(args.prompt, seed=i, steps=args.steps, guidance=args.guidance) for i in range(args.repeats)]
    stages = {
        name: round(float(np.median([clip.seconds_per_stage[name] for clip in clips])), 3)
        for name in clips[0].seconds_per_stage
    }
    row = {
        "bench": "sample_clip",
        "steps": clips[0].steps,
        "guidance": clips[0].guidance,
        "seconds_per_stage": {"load": round(load, 3), **stages},
        "seconds_total": round(load + sum(stages.values()), 3),
        **environment(),
        "threads": args.threads,
    }
    Console().print(row)
    append_rows([row])


if __name__ == "__main__":
    main(tyro.cli(Args))
