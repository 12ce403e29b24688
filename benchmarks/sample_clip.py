"""Seconds per stage of sampling one clip with the built-in model on the kernels and on plain PyTorch, medians.

    python benchmarks/sample_clip.py [--variant teacher] [--steps 16] [--repeats 5] [--threads 2]

Appends two rows to benchmarks/results/<device>.jsonl.
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
from javis.host_memory import ask_for_huge_pages
from javis.model.ops import ModelOps
from javis.pipeline import ClipBatch


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to time."""

    prompt: str = "a red ball bounces on the left"
    variant: str | None = None  # teacher or student; default: the one that `javis sample` takes
    steps: int | None = None  # default: the checkpoint's
    guidance: float | None = None  # default: the checkpoint's
    repeats: int = 5
    threads: int = 2


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    pipes, load = {}, {}
    for name, ops in (("fused", ModelOps.fused()), ("reference", ModelOps())):
        started = time.perf_counter()
        pipes[name] = JavisPipeline.from_pretrained("demo", ops=ops)
        load[name] = time.perf_counter() - started
        pipes[name](args.prompt, seed=0, steps=args.steps, variant=args.variant)  # warm-up
    clips: dict[str, list[ClipBatch]] = {name: [] for name in pipes}
    for i in range(args.repeats):
        for name, pipe in pipes.items():  # taking turns: the machine is the same for both
            clip = pipe(args.prompt, seed=i, steps=args.steps, guidance=args.guidance, variant=args.variant)
            clips[name].append(clip)
    rows = []
    for name, made in clips.items():
        stages = {
            stage: round(float(np.median([clip.seconds_per_stage[stage] for clip in made])), 3)
            for stage in made[0].seconds_per_stage
        }
        rows.append(
            {
                "bench": "sample_clip",
                "ops": name,
                "variant": made[0].choice.variant,
                "steps": made[0].steps,
                "guidance": made[0].guidance,
                "order": made[0].order,
                "repeats": args.repeats,
                "seconds_per_stage": {"load": round(load[name], 3), **stages},
                "seconds_total": round(load[name] + sum(stages.values()), 3),
                **environment(),
                "threads": args.threads,
            }
        )
        Console().print(rows[-1])
    append_rows(rows)


if __name__ == "__main__":
    ask_for_huge_pages()
    main(tyro.cli(Args))
