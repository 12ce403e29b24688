"""One small call of every op on each of our kernels, forward and backward: what the sanitizer watches.

    python -m benchmarks.gpu.calls [--device cpu] [--op NAME] [--backends cuda triton]

Results are compared with the reference in float64 by the same budget as everywhere, so that this is a quick test, too.
0: all within their budget; 1: one was not, or nothing ran on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from functools import partial

import torch

from javis import bench
from javis.kernels import OPS
from javis.kernels.backend import why_not, why_not_auto
from javis.kernels.cases import OpCase

OURS = ("cuda", "triton", "cpu")


def small_cases(name: str, *, flops: float = 1e7, moved: float = 2e5) -> list[OpCase]:
    """The cases of an op on few tokens, each kind of call once: equal calls of cases that differ in size alone."""
    found: dict[str, OpCase] = {}
    for case in OPS[name].cases():
        small = case.smaller(flops=flops, bytes=moved)
        found.setdefault(str({**vars(small), "name": None}), small)
    return list(found.values())


def backends(name: str, case: OpCase, device: str, wanted: Sequence[str] | None) -> list[str]:
    """Those that run this call, the reference aside; also Triton's interpreter where it was asked for by name."""
    args, kwargs = case.inputs(device=device)
    found = []
    for backend in OPS[name].checks:
        named = wanted is not None and backend.value in wanted
        if backend.value == "reference" or (wanted is not None and not named):
            continue
        check = why_not if named else why_not_auto
        if check(OPS[name].checks, backend, *args, *kwargs.values()) is None:
            found.append(backend.value)
    return found


def variants(name: str, case: OpCase, device: str, wanted: Sequence[str] | None) -> dict[str, bench.Call]:
    """The calls to compare, by backend."""
    return {b: partial(OPS[name].function, backend=b) for b in backends(name, case, device, wanted)}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu.calls", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--op", nargs="+", choices=tuple(OPS), default=list(OPS))
    made.add_argument("--backends", nargs="+", default=OURS, help="the sanitizer is for kernels of our own")
    made.add_argument("--most", type=int, default=None, help="at most so many cases of each op")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(arguments)
    ran = failed = 0
    for name in args.op:
        for case in small_cases(name)[: args.most]:
            calls = variants(name, case, args.device, args.backends)
            if not calls:
                continue
            try:
                bench.check(name, case, calls, args.device)
                word = "ok"
            except Exception as error:  # noqa: BLE001 - every op is to have its turn; the last line and the status tell
                traceback.print_exc()
                failed, word = failed + 1, f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ran += 1
            print(f"{name}, {case.name}, {', '.join(calls)}: {word}", flush=True)
    if args.device == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} calls, {failed} failed" if ran else "no backend runs here")
    return 1 if failed or (not ran and args.device == "cuda") else 0


if __name__ == "__main__":
    sys.exit(main())
