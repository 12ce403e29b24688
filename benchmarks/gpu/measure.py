"""The microbenchmarks of one op, case by case: a case that is red is reported, and the others are measured.

    python -m benchmarks.gpu.measure --op NAME [--device cuda] [--seconds 0.3] [--smallest]

Like `javis bench kernels`, for images without tyro. 0: every case was measured; 1: one was red.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from javis import bench
from javis.kernels import OPS


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--op", nargs="+", choices=tuple(OPS), required=True)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--seconds", type=float, default=0.3, help="for each case and mode")
    made.add_argument("--smallest", action="store_true", help="only the case that moves the fewest bytes")
    made.add_argument("--results", type=Path, default=None, help="folder of the rows")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(arguments)
    if args.results is not None:
        bench.RESULTS = args.results
    red = 0
    for name in args.op:
        cases = OPS[name].cases()
        if args.smallest:
            cases = [min(cases, key=lambda case: case.bytes())]
        # bfloat16 is what the model runs in: first, should the time run out.
        for case in sorted(cases, key=lambda case: "float32" in case.name):
            config = bench.BenchConfig(op=name, shape=case.name, device=args.device, seconds=args.seconds)
            try:
                rows = bench.run(config)
            except Exception as error:  # noqa: BLE001 - one red case must not cost the others their GPU time
                traceback.print_exc()
                print(
                    f"RED {name}, {case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True
                )
                red += 1
                continue
            for row in rows:
                if row["backend"] not in ("copy", "matmul"):
                    speed = f"{row['gb_per_s']:9.1f} GB/s {row['share_of_copy']:7.1%}"
                    if row["bound"] == "flops":
                        speed = f"{row['tflop_per_s']:9.3f} TF/s {row['share_of_matmul']:7.1%}"
                    about = f"{name}, {case.name}, {row['mode']}, {row['backend']}"
                    print(f"{about:90} {row['p50_ms']:10.4f} ms {speed}", flush=True)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
