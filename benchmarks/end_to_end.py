"""Seconds from the prompt to the file: every stage of the full-size pipeline, rung by rung.

    python -m benchmarks.end_to_end --clips 512x512 720p         on a GPU, all components at full size, random weights
    python -m benchmarks.end_to_end --size toy                   the same classes with few channels, on any machine
    python -m benchmarks.end_to_end --size toy --dry-run         the rungs of a GPU as well, to try the script

Stages: text, prior, condition, denoise, video_decode, audio_decode, mux (the writing of the mp4). Rungs:

upstream  the official computation of the model (benchmarks/baselines/upstream_equivalent.py), which conditions in every
          step
eager     the de-duplicated model, priors folded, in plain PyTorch
fused     on our kernels
graph     + each step as one CUDA graph (javis/sample/graph.py)
fp8       + FP8 linear layers (javis/precision.py); both on a GPU only

Encoders and decoders are the pipeline's in every rung (benchmarks/decode.py compares the decodes of the video).

Weights are random and shared by all rungs; the same call of the pipeline is timed that users make. Rungs take turns. A
denoising that would take longer than ``--sample-seconds`` is cut to fewer steps and its time multiplied; the row says
by what. Beside each stage stand the peak of its memory (on a GPU), the peak that ``javis plan`` predicts, and the
roofline: the time of its calls at the speed of the large product and of the copy measured between the turns.

A rung that cannot run here is left out, with the reason; one that was asked for by name is refused. In a dry run the
step itself stands for its graph and FP8 products are emulated; it writes no rows by itself.

One row per clip, rung and number of steps goes to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.baselines.upstream_equivalent import as_upstream
from benchmarks.ladder import Peaks
from benchmarks.rungs import make_model
from javis import JavisPipeline, bench
from javis.bench import append_rows, environment
from javis.clip_stages import STAGES
from javis.media import samples_for
from javis.model.dit import Velocity
from javis.model.ops import ModelOps
from javis.precision import MULTIPLE, apply_precision, linear_names
from javis.precision import why_not as why_no_precision
from javis.prediction import Choice, Predictor
from javis.rates import given
from javis.sample import Denoiser
from javis.sample.graph import CudaGraphs, GraphedDenoiser
from javis.stages import ClipSize, parts_of

Row = dict[str, Any]
RUNGS = ("upstream", "eager", "fused", "graph", "fp8")
PROMPT = "rain falls on a tin roof while a dog barks in the distance"


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=(__doc__ or "").partition("\n")[0]
    )
    made.add_argument("--size", choices=("full", "toy"), default="full")
    made.add_argument("--clips", nargs="+", default=None, help="resolutions; 512x512 720p, for the toy 64x64")
    made.add_argument("--seconds", type=float, default=None, help="length of the clip; 2, for the toy 0.5")
    made.add_argument("--rungs", nargs="+", choices=RUNGS, default=None, help="by default all that can run here")
    made.add_argument("--dry-run", action="store_true", help="the rungs of a GPU on any machine, to try the script")
    made.add_argument("--steps", nargs="+", type=int, default=[30, 4])
    made.add_argument("--repeats", type=int, default=3, help="turns of each rung")
    made.add_argument("--sample-seconds", type=float, default=8.0, help="a denoising that takes longer is cut")
    made.add_argument("--limit", type=float, default=420.0, help="seconds after which no further turn is begun")
    made.add_argument("--device", choices=("cuda", "cpu"), default=None)
    made.add_argument("--json", type=Path, default=None, help="write the rows (and what failed) here")
    made.add_argument("--results", type=Path, default=None, help="folder of the rows; for the toy none by default")
    return made


class EveryStep(nn.Module):
    """A model that conditions anew in every step, as the official code does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.told: dict[str, Any] = {}

    @property
    def null_text(self) -> Any:
        return self.model.null_text

    @property
    def null_prior(self) -> Any:
        return self.model.null_prior

    def condition(self, text: Any, **told: Any) -> Any:
        self.told = {"text": text, **told}
        return self.model.condition(**self.told)

    def denoise(self, video: Any, audio: Any, timestep: Any, condition: Any, **masks: Any) -> Any:
        return self.model.denoise(video, audio, timestep, self.model.condition(**self.told), **masks)


class Itself:
    """Stands for CUDA graphs in a dry run: captures nothing, and replays by calling."""

    def why_not(self, device: torch.device) -> str | None:
        return None

    def capture(self, function: Callable[[], Velocity]) -> tuple[Velocity, Callable[[], None]]:
        out = function()

        def replay() -> None:
            for memory, value in zip(out, function(), strict=True):
                memory.copy_(value)

        return out, replay


def why_not(rung: str, device: str, *, dry: bool = False) -> str | None:
    """Why a rung cannot run on "cuda" or "cpu", or None."""
    if dry or rung not in ("graph", "fp8"):
        return None
    graphs = CudaGraphs().why_not(torch.device(device))
    return graphs or (why_no_precision("fp8", device) if rung == "fp8" else None)


def model_of(rung: str, pipe: JavisPipeline, *, dry: bool = False) -> nn.Module:
    """The model of a rung, on the weights of the pipeline's."""
    weights, plain = dict(pipe.model.state_dict()), rung in ("upstream", "eager")
    model = make_model(pipe.model.config, ModelOps() if plain else ModelOps.fused(), weights)
    if rung == "fp8":
        shapes = {name: model.get_submodule(name).weight.shape for name in linear_names(model)}
        keep = [name for name, shape in shapes.items() if any(n % MULTIPLE for n in shape)]  # of the toy
        model = apply_precision(model, "fp8", keep=keep, emulate=dry, dtype=None if dry else torch.bfloat16)
    return EveryStep(as_upstream(model)) if rung == "upstream" else model


def denoiser_of(rung: str, model: Any, *, dry: bool = False) -> Denoiser | None:
    """What denoises in place of the model; None: the model itself."""
    if rung not in ("graph", "fp8"):
        return None
    return GraphedDenoiser(model, backend=Itself() if dry else None)


class Table:
    """The rungs on one clip and one number of steps."""

    def __init__(self, pipe: JavisPipeline, clip: str, steps: int, args: argparse.Namespace) -> None:
        self.pipe, self.clip, self.steps, self.args = pipe, clip, steps, args
        self.models = {rung: model_of(rung, pipe, dry=args.dry_run) for rung in args.rungs}
        self.denoisers = {rung: denoiser_of(rung, m, dry=args.dry_run) for rung, m in self.models.items()}
        self.times: dict[str, list[dict[str, float]]] = {}
        self.peaks: dict[str, dict[str, int]] = {}
        self.measured_steps: dict[str, int] = {}
        self.failed: list[Row] = []
        self.made: Any = None

    def say(self, text: str) -> None:
        print(f"{self.clip}, {self.steps} steps: {text}", flush=True)

    def once(self, rung: str, steps: int) -> dict[str, float]:
        """Seconds of every stage of one clip, the denoising multiplied up to all steps."""
        self.pipe.model, self.pipe.denoiser = self.models[rung], self.denoisers[rung]  # type: ignore[assignment]
        self.pipe.residency.records.clear()
        with tempfile.TemporaryDirectory() as folder:
            made = self.pipe(PROMPT, seconds=self.args.seconds, resolution=self.clip, steps=steps, seed=0)
            started = time.perf_counter()
            made.save(Path(folder) / "clip.mp4")
            mux = time.perf_counter() - started
        self.made = made
        found = {record.stage: record.seconds for record in self.pipe.residency.records} | {"mux": mux}
        found["denoise"] *= self.steps / steps
        peaks = {record.stage: record.peak_bytes or 0 for record in self.pipe.residency.records}
        self.peaks[rung] = {s: max(n, self.peaks.get(rung, {}).get(s, 0)) for s, n in peaks.items()}
        return found

    def run(self, speeds: Peaks, end: float) -> None:
        """Warm-up, then turns."""
        for rung in self.args.rungs:
            try:
                self.once(rung, 1)  # first call: compilation, tuning of libraries
                step = self.once(rung, 1)["denoise"] / self.steps
            except Exception as error:  # noqa: BLE001 - a rung that breaks must not cost the others their GPU time
                traceback.print_exc()
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                self.failed.append({"bench": "end_to_end", "clip": self.clip, "rung": rung, "error": why})
                self.say(f"{rung} FAILED: {why}")
                continue
            self.measured_steps[rung] = min(self.steps, max(1, int(self.args.sample_seconds / step)))
            self.times[rung] = []
        for turn in range(self.args.repeats):
            speeds.sample()
            for rung, taken in self.times.items():
                if taken and time.monotonic() > end:
                    self.say(f"out of time in turn {turn + 1} of {self.args.repeats}")
                    return
                taken.append(self.once(rung, self.measured_steps[rung]))

    def size(self) -> ClipSize:
        """What was made, in whole windows of the codecs."""
        video = self.made.video
        window = int(getattr(self.pipe.video_codec, "frame_window", 1))
        frames = -(-video.shape[1] // window) * window
        samples = samples_for(frames, self.made.fps, self.pipe.sample_rate)
        return ClipSize(
            frames=frames, height=video.shape[2], width=video.shape[3], fps=float(self.made.fps), samples=samples,
            steps=self.steps, guided=self.made.guidance != 1,
        )  # fmt: skip

    def rows(self, speeds: Peaks, predictor: Predictor) -> list[Row]:
        """One for each rung."""
        flops, copied = median(speeds.flops), median(speeds.bytes)
        rates = given(flops / 1e12, copied / 1e9, "measured beside it")
        rows = []
        for rung, taken in self.times.items():
            if not taken:
                continue
            clip = self.size()
            planned = predictor.stages(clip, Choice(), dict.fromkeys(STAGES, rates), 1e8)
            stages: dict[str, Row] = {}
            for stage in STAGES:
                seconds = [times[stage] for times in taken]
                plan = planned[stage] if rung == "fused" and stage != "mux" else {}
                stages[stage] = {
                    "s_p50": round(median(seconds), 5),
                    "s_min": round(min(seconds), 5),
                    "peak_gb": round(self.peaks[rung].get(stage, 0) / 1e9, 3) or None,
                    "planned_gb": round(plan["peak_gb"], 3) if plan else None,
                    "roofline_s": round(plan["seconds"], 5) if plan else None,
                }
            rows.append({
                "bench": "end_to_end", "size": self.args.size, "random_weights": True, "clip": self.clip,
                "frames": clip.frames, "rung": rung, "steps": self.steps, "guidance": clip.guided,
                "dtype": str(predictor.parts.dtype).removeprefix("torch."), "samples": len(taken),
                "measured_steps": self.measured_steps[rung],
                "multiplied_by": round(self.steps / self.measured_steps[rung], 4), "stages": stages,
                "s_p50": round(median([sum(times.values()) for times in taken]), 5),
                "clip_seconds": round(self.made.video.shape[1] / float(self.made.fps), 4),
                "matmul_tflop_per_s": round(flops / 1e12, 4), "copy_gb_per_s": round(copied / 1e9, 2),
            })  # fmt: skip
        return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text: seconds of the stages, the whole, the gain over the first rung of the same clip and steps."""
    lines = [" " * 30 + "".join(f"{stage:>13}" for stage in (*STAGES, "all", "x first"))]
    first: dict[tuple[Any, ...], float] = {}
    for row in rows:
        base = first.setdefault((row["clip"], row["steps"]), row["s_p50"])
        name = f"{row['clip']}, {row['steps']} steps, {row['rung']}"
        cells = [f"{row['stages'][stage]['s_p50']:.3f}" for stage in STAGES]
        cells += [f"{row['s_p50']:.3f}", f"{base / row['s_p50']:.2f}"]
        cut = "" if row["multiplied_by"] == 1 else f"  {row['measured_steps']} steps x {row['multiplied_by']:g}"
        lines.append(f"{name:30}" + "".join(f"{cell:>13}" for cell in cells) + cut)
        planned = [row["stages"][stage] for stage in STAGES]
        if any(stage["peak_gb"] and stage["planned_gb"] for stage in planned):
            cells = [f"{s['peak_gb'] or 0:.1f} / {s['planned_gb'] or 0:.1f}" for s in planned]
            lines.append(f"{'  GB measured / planned':30}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 all rungs timed, 1 some failed, 2 cannot run."""
    args = parser().parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("end_to_end: torch finds no CUDA device; use --size toy --device cpu", file=sys.stderr)
        return 2
    if args.dry_run and args.device == "cuda":
        print("end_to_end: --dry-run stands for a GPU where there is none; leave it out on one", file=sys.stderr)
        return 2
    reasons = {rung: why_not(rung, args.device, dry=args.dry_run) for rung in args.rungs or RUNGS}
    left_out = {rung: reason for rung, reason in reasons.items() if reason is not None}
    for rung, reason in left_out.items():
        print(f"end_to_end: rung {rung} {reason}", file=sys.stderr if args.rungs else sys.stdout)
    if left_out and args.rungs:
        return 2
    args.rungs = [rung for rung in RUNGS if rung in reasons and rung not in left_out]
    clips = args.clips or (["64x64"] if args.size == "toy" else ["512x512", "720p"])
    end = time.monotonic() + args.limit
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    pipe = JavisPipeline.with_random_weights(args.size, device=args.device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    predictor = Predictor(parts_of(pipe.components))
    where = environment(args.device)
    rows: list[Row] = []
    failed: list[Row] = []
    for clip in clips:
        for steps in args.steps:
            own, speeds = pipe.model, Peaks(args.device, quick=args.size == "toy")
            speeds.a = speeds.a.to(dtype)
            made = Table(pipe, clip, steps, args)
            made.run(speeds, end)
            pipe.model, pipe.denoiser = own, None
            rows += [row | where for row in made.rows(speeds, predictor)]
            failed += made.failed
            if args.json is not None:
                facts = {"rows": rows, "failed": failed, "left_out": left_out}
                args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if rows and ((args.size == "full" and not args.dry_run) or args.results is not None):
        if args.results is not None:
            bench.RESULTS = args.results
        append_rows(rows)
    print(table(rows))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
