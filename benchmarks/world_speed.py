"""Clips of the world per second on one core: scene, frames, sound, caption.

    python benchmarks/world_speed.py [--clips 300]

Appends one row to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import tyro
from rich.console import Console

from javis.bench import append_rows, environment
from javis.world import caption, render_audio, render_video, sample_scene


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to time."""

    clips: int = 300


def main(args: Args) -> None:
    seconds = []
    for seed in range(args.clips + 10):
        started = time.perf_counter()
        scene = sample_scene(seed)
        render_video(scene)
        render_audio(scene)
        caption(scene)
        seconds.append(time.perf_counter() - started)
    p20, p50, p80 = (float(1 / np.quantile(seconds[10:], q)) for q in (0.8, 0.5, 0.2))
    rates = {"clips_per_s_p20": round(p20, 1), "clips_per_s_p50": round(p50, 1), "clips_per_s_p80": round(p80, 1)}
    row = {"bench": "world_speed", "clips": args.clips, **rates, **environment(), "threads": 1}
    Console().print(row)
    append_rows([row])


if __name__ == "__main__":
    main(tyro.cli(Args))
