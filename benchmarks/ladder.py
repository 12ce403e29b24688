"""The latency ladder: seconds of the denoise loop of the full-size model, rung by rung (benchmarks/rungs.py).

    python -m benchmarks.ladder --clips 512x512 240p 720p           on a GPU
    python -m benchmarks.ladder --clips 512x512 --profile out       also a profile of one step of each rung
    python -m benchmarks.ladder --quick                             a toy size on any machine, to try the script

The weights are random and made on the device; batch 1, guidance as two samples in one batch, 2 s clips. First every
rung is compared with the float32 computation; one that is too far from it is not timed. Then the rungs take turns in
random order, each turn a loop from noise. The speeds of a large bfloat16 product and of a copy are measured between the
turns. A loop that would take longer than ``--sample-seconds`` is cut: the row says how many steps were measured
(``measured_steps``) and what their time was multiplied by (``multiplied_by``), and the conditioning is added
(``condition_s``; measured apart, once per clip). Shorter schedules are the first steps of the longest: every step
costs the same, but for the rungs that approximate (guidance interval, cache): those are timed in whole loops of the
longest schedule. Rows of 8 and 4 steps without guidance are what a student of so few steps costs. ``cold_s`` is the
time to the first finished step with weights in place: compilation (as far as the caches of torch and Triton do not
have it), capture, conditioning.

One row per clip, rung, number of steps and guidance goes to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import rungs as r
from benchmarks.rungs import APPROXIMATE, RUNGS, Clip, Runner, elapsed, mark, synchronize
from javis import bench
from javis.bench import append_rows, environment
from javis.plan import condition_flops, official_extra_flops, step_flops
from javis.timing import quantile
from javis.work import floor_seconds, step_work, total

Row = dict[str, Any]
CLIPS = ("512x512", "240p", "720p")
STEPS = (30, 8, 4)
# How far from float32 a rung may be, in RMS of the velocity: half as far again as eager bfloat16. FP8 keeps three bits
# of each mantissa where bfloat16 keeps seven, so it has a bound of its own; the error is stated in every row.
TIMES_EAGER = 1.5
FP8_LIMIT = 0.15
# A graph replays the kernels of the steps, but a library may choose another product of the same shape while it is made.
SAME = 5e-3


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--clips", nargs="+", choices=CLIPS, default=list(CLIPS))
    made.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    made.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="lengths of the schedule")
    made.add_argument("--guidance", nargs="+", choices=("with", "without"), default=["with", "without"])
    made.add_argument("--repeats", type=int, default=3, help="turns of each rung")
    made.add_argument("--sample-seconds", type=float, default=8.0, help="a loop that takes longer is cut")
    made.add_argument("--limit", type=float, default=420.0, help="seconds after which no further turn is begun")
    made.add_argument("--device", choices=("cuda", "cpu"), default=None)
    made.add_argument("--profile", type=Path, default=None, help="folder for a trace and a table of one step per rung")
    made.add_argument("--json", type=Path, default=None, help="write the rows (and what failed) here")
    made.add_argument("--results", type=Path, default=None, help="folder of the rows; with --quick: none by default")
    made.add_argument("--quick", action="store_true", help="toy size, on any machine")
    return made


class Peaks:
    """Speed of a large bfloat16 product and of a copy on this device, sampled now and then."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, side = device, 256 if quick else 8192
        self.a = torch.randn(side, side, device=device).to(torch.bfloat16)
        self.buffer = torch.zeros((1 << 20) if quick else (1 << 30), dtype=torch.uint8, device=device)
        self.flops: list[float] = []
        self.bytes: list[float] = []
        self.sample()
        self.flops.clear()  # the first was the warm-up
        self.bytes.clear()

    def sample(self) -> None:
        for _ in range(3):
            start = mark(self.device)
            self.a @ self.a
            middle = mark(self.device)
            self.buffer.clone()
            end = mark(self.device)
            synchronize(self.device)
            self.flops.append(2 * self.a.shape[0] ** 3 / elapsed(start, middle))
            self.bytes.append(2 * self.buffer.nbytes / elapsed(middle, end))


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Largest and RMS difference relative to the same of what is expected; the worse of video and audio."""
    pairs = [(a.double().cpu(), e.double().cpu()) for a, e in zip(actual, expected, strict=True)]
    if not all(bool(torch.isfinite(a).all()) for a, _ in pairs):
        return float("inf"), float("inf")
    largest = max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs)
    return largest, max(float((a - e).square().mean().sqrt() / e.square().mean().sqrt()) for a, e in pairs)


def tflop(clip: Clip, runner: Runner) -> tuple[float, float]:
    """TFLOP of a step and of the conditioning of this rung."""
    batch = 2 if runner.guided else 1
    if runner.rung == "upstream":
        flops = sum(step_flops(clip.config, clip.grid, batch=batch).values())
        return (flops + official_extra_flops(clip.config, clip.grid, batch=batch)) / 1e12, 0.0
    step = total(step_work(clip.config, clip.grid, batch=batch, folded=runner.folded))[0]
    return step / 1e12, condition_flops(clip.config, clip.grid, batch=batch) / 1e12


class Ladder:
    """The rungs on one clip, with or without guidance."""

    def __init__(self, clip: Clip, weights: dict[str, Tensor], guided: bool, args: argparse.Namespace) -> None:
        self.clip, self.weights, self.guided, self.args, self.device = clip, weights, guided, args, args.device
        self.exact = r.exact_velocity(clip, weights, guided=guided, device=self.device)
        self.failed: list[Row] = []
        self.runners: dict[str, Runner] = {}
        self.about: dict[str, Row] = {}
        self.marks: dict[str, list[list[float]]] = {}

    def say(self, text: str) -> None:
        print(f"{self.clip.name}, {'guided' if self.guided else 'unguided'}: {text}", flush=True)

    def fail(self, rung: str, why: str) -> None:
        self.say(f"{rung} FAILED: {why}")
        row = {"bench": "ladder", "clip": self.clip.name, "rung": rung, "guidance": self.guided, "error": why}
        self.failed.append(row)

    def start(self) -> None:
        """Cold start, memory and error of every rung; those that fail are left out and reported."""
        loops: dict[str, tuple[Tensor, Tensor]] = {}
        for rung in self.args.rungs:
            reason = r.why_not(rung, self.device)
            if rung == "interval" and not self.guided:
                continue  # the same as fused_compile
            if reason is not None:
                self.say(f"{rung} is skipped: {reason}")
                continue
            try:
                self._start(rung, loops)
            except Exception as error:  # noqa: BLE001 - a rung that breaks must not cost the others their GPU time
                traceback.print_exc()
                self.fail(rung, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                self.runners.pop(rung, None)
                gc.collect()
        if "eager" in self.about:
            base = self.about["eager"]["error_rms"]
            for rung in list(self.runners):
                limit = FP8_LIMIT if rung.startswith("fp8") else TIMES_EAGER * base
                if not self.about[rung]["error_rms"] <= limit:
                    self.fail(rung, f"RMS error {self.about[rung]['error_rms']:.2e}, at most {limit:.2e}: not timed")
                    del self.runners[rung]
            for rung, latents in loops.items():  # what a replayed graph computes shows here, not in one prediction
                self.about[rung]["latents_from_eager"] = difference(latents, loops["eager"])[1]

    def _start(self, rung: str, loops: dict[str, tuple[Tensor, Tensor]]) -> None:
        cuda = self.device == "cuda"
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - sum(w.nbytes for w in self.weights.values())
        runner = Runner(
            rung, self.clip, self.weights, guided=self.guided, steps=max(self.args.steps), device=self.device,
            backend="inductor" if cuda else "eager",
        )  # fmt: skip
        cold = runner.start()
        marks = runner.loop(2)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else None
        loops[rung] = (runner.video.cpu().clone(), runner.audio.cpu().clone())
        largest, rms = difference(runner.first_velocity(), self.exact)
        gap = difference(*runner.replayed())[1] if runner.replay is not None else 0.0
        if not gap <= SAME:
            raise AssertionError(f"the graph gives other latents than its steps: RMS difference {gap:.1e}")
        step = marks[1] - marks[0]
        self.runners[rung], self.marks[rung] = runner, []
        self.about[rung] = {
            "cold_s": cold, "condition_s": min(runner.conditioning() for _ in range(2)),
            "peak_memory_gb": peak, "error_max": largest, "error_rms": rms, "latents_from_eager": None, "step_s": step,
        }  # fmt: skip
        self.say(f"{rung}: cold {cold:.1f} s, step {step:.4f} s, RMS error {rms:.1e}")

    def turns(self, peaks: Peaks, end: float) -> None:
        """The rungs in random order, again and again."""
        order = random.Random(0)
        longest = max(self.args.steps)
        for repeat in range(self.args.repeats):
            peaks.sample()
            for rung in order.sample(sorted(self.runners), len(self.runners)):
                if repeat > 0 and time.monotonic() > end:
                    self.say(f"out of time in turn {repeat + 1} of {self.args.repeats}")
                    return
                affordable = int(self.args.sample_seconds / self.about[rung]["step_s"])
                affordable = longest if rung in APPROXIMATE else max(1, affordable)
                self.marks[rung].append(self.runners[rung].loop(min(longest, affordable)))
        peaks.sample()

    def rows(self, peaks: Peaks) -> list[Row]:
        """One for each rung and number of steps."""
        made = []
        flops_per_s, bytes_per_s = median(peaks.flops), median(peaks.bytes)
        for rung, runner in self.runners.items():
            about = self.about[rung]
            per_step, once = tflop(self.clip, runner)
            batch = 2 if self.guided else 1
            work = step_work(self.clip.config, self.clip.grid, batch=batch, folded=runner.folded)
            for steps in sorted(self.args.steps, reverse=True)[: 1 if rung in APPROXIMATE else None]:
                share = runner.share_of_work(steps)
                taken = [(marks, min(steps, len(marks))) for marks in self.marks[rung] if marks]
                if not taken:
                    continue
                seconds = [about["condition_s"] + marks[k - 1] * steps / k for marks, k in taken]
                middle, done = quantile(seconds, 0.5), once + steps * per_step * share
                memory, floor = about["peak_memory_gb"], steps * share * floor_seconds(work, flops_per_s, bytes_per_s)
                made.append({
                    "bench": "ladder", "clip": self.clip.name, "rung": rung, "steps": steps, "guidance": self.guided,
                    "dtype": "bfloat16", "s_p20": round(quantile(seconds, 0.2), 5), "s_p50": round(middle, 5),
                    "s_p80": round(quantile(seconds, 0.8), 5), "samples": len(seconds),
                    "measured_steps": taken[0][1], "multiplied_by": round(steps / taken[0][1], 4),
                    "condition_s": round(about["condition_s"], 5), "cold_s": round(about["cold_s"], 3),
                    "tflop": round(done, 5), "tflop_per_s": round(done / middle, 4),
                    "matmul_tflop_per_s": round(flops_per_s / 1e12, 3),
                    "copy_gb_per_s": round(bytes_per_s / 1e9, 1),
                    "share_of_matmul": round(done * 1e12 / middle / flops_per_s, 4), "roofline_s": round(floor, 5),
                    "peak_memory_gb": None if memory is None else round(memory, 3),
                    "share_of_work": round(share, 4),
                    **{name: about[name] for name in ("error_max", "error_rms", "latents_from_eager")},
                })  # fmt: skip
        return made

    def profile(self, folder: Path) -> None:
        """A chrome trace and the twenty most expensive operations of one step of each rung."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        folder.mkdir(parents=True, exist_ok=True)
        for rung, runner in self.runners.items():
            with torch.profiler.profile(activities=activities) as profile:
                runner.loop(1)
            name = folder / f"{self.clip.name}-{'guided' if self.guided else 'unguided'}-{rung}"
            profile.export_chrome_trace(f"{name}.json.gz")
            table = profile.key_averages().table(sort_by=f"self_{self.device}_time_total", row_limit=20)
            Path(f"{name}.txt").write_text(table, encoding="utf-8")
            self.say(f"profile of {rung}: {name}.json.gz, {name}.txt")


def table(rows: Sequence[Row]) -> str:
    """The rows as text, with the gain over the first rung of the same clip, steps and guidance."""
    heads = ("seconds", "p20", "p80", "x first", "of peak", "GB", "RMS err", "cold s")
    lines = [" " * 40 + "".join(f"{head:>9}" for head in heads)]
    first: dict[tuple[Any, ...], float] = {}
    for row in rows:
        key = (row["clip"], row["steps"], row["guidance"])
        base = first.setdefault(key, row["s_p50"])
        name = f"{row['clip']}, {row['steps']} steps{', CFG' if row['guidance'] else ''}, {row['rung']}"
        cut = "" if row["multiplied_by"] == 1 else f"  {row['measured_steps']} steps x {row['multiplied_by']:g}"
        numbers = [f"{row[key]:.3f}" for key in ("s_p50", "s_p20", "s_p80")]
        numbers += [f"{base / row['s_p50']:.2f}", f"{row['share_of_matmul']:.1%}", f"{row['peak_memory_gb'] or 0:.1f}"]
        numbers += [f"{row['error_rms']:.1e}", f"{row['cold_s']:.1f}"]
        lines.append(f"{name:40}" + "".join(f"{number:>9}" for number in numbers) + cut)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 all rungs timed, 1 some failed, 2 cannot run."""
    args = parser().parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("ladder: torch finds no CUDA device; try --quick", file=sys.stderr)
        return 2
    if args.device == "cpu" and not args.quick:
        print("ladder: the full-size model needs a GPU; --quick tries the script at toy size", file=sys.stderr)
        return 2
    if min(args.steps) < 1 or args.repeats < 1:
        print("ladder: --steps and --repeats must be 1 or more", file=sys.stderr)
        return 2
    if args.results is not None:
        bench.RESULTS = args.results
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    end, where = time.monotonic() + args.limit, environment(args.device)
    rows: list[Row] = []
    failed: list[Row] = []
    peaks = Peaks(args.device, args.quick)
    for clip in [r.toy_clip()] if args.quick else [r.official_clip(name) for name in args.clips]:
        weights = r.random_weights(clip.config, args.device, torch.bfloat16)
        for guided in (given == "with" for given in args.guidance):
            ladder = Ladder(clip, weights, guided, args)
            ladder.start()
            ladder.turns(peaks, end)
            if args.profile is not None:
                ladder.profile(args.profile)
            made = [{**row, **where} for row in ladder.rows(peaks)]
            if made and not (args.quick and args.results is None):
                append_rows(made)
            rows += made
            failed += ladder.failed
            del ladder
            gc.collect()
            if args.json is not None:
                args.json.write_text(json.dumps(rows + failed, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"bfloat16 product {median(peaks.flops) / 1e12:.4g} TFLOP/s, copy {median(peaks.bytes) / 1e9:.4g} GB/s")
    for row in failed:
        print(f"FAILED {row['clip']}, {'guided' if row['guidance'] else 'unguided'}, {row['rung']}: {row['error']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
