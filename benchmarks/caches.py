"""Caches across steps on the built-in model: quality against saved work, beside the control: fewer steps.

    python -m benchmarks.caches [--clips 8] [--append]      a table; --append adds its rows to benchmarks/results
    python -m benchmarks.caches --fit                       the polynomials of "tea", for "sampling" in config.json

Prompts are those for development (seed 2,000,000 on), of one and two sources; no figure of the docs is made from them.
"work" counts the FLOPs of the denoise loop (javis/work.py) relative to the checkpoint's own steps without a cache.
"video_error" and "audio_error" are RMS differences of the final latents from those, over their standard deviation.
A cache is worth something if it is closer, and synchrony no worse, than fewer steps at the same work: the "control_"
columns are those of exact sampling with fewer steps, interpolated to the cache's work.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor

from javis import JavisPipeline
from javis.bench import append_rows, environment
from javis.cache_options import ATTENTIONS, parse_cache
from javis.errors import UsageError
from javis.eval.matching import total_counts
from javis.eval.stats import bootstrap_interval
from javis.eval.world_report import Clip, Measured, agreement, held_out_scenes, measure
from javis.model.blocks import Stream
from javis.model.config import JavisDiTConfig
from javis.model.dit import Conditioning, Velocity
from javis.plan import Grid, token_grid
from javis.sample.cache import modulated_input, relative_change
from javis.work import prior_axes, step_work
from javis.world import WorldConfig, caption

Row = dict[str, Any]
STREAMS: tuple[Stream, ...] = get_args(Stream)
SEED = 2_000_000
CACHES = (
    "first-block=0.05", "first-block=0.1", "first-block=0.2", "tea=0.1", "tea=0.2", "attention=2", "attention=1,text=4",
)  # fmt: skip
CONTROLS = (12, 10, 8, 6, 4)


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to measure."""

    checkpoint: str = "demo"
    clips: int = 8
    """Half with one source, half with two."""
    seed: int = SEED
    steps: int | None = None
    """Evaluations without a cache (default: the checkpoint's)."""
    caches: tuple[str, ...] = CACHES
    """As for javis sample --cache; polynomials of "tea" are those in the checkpoint's config.json."""
    controls: tuple[int, ...] = CONTROLS
    """Numbers of steps of the control."""
    fit: bool = False
    """Fit the polynomials of "tea" instead."""
    degree: int = 2
    """Of the polynomials."""
    append: bool = False
    """Add the rows to benchmarks/results/<device>.jsonl."""


# -- work --------------------------------------------------------------------------------------------------------------


def share_of_work(config: JavisDiTConfig, grid: Grid, report: Row, *, text: int | None = None) -> float:
    """FLOPs of the matrix products of a clip with a cache, over those without.

    Args:
        report: of :meth:`javis.sample.cache.CachedDenoiser.report`. text: caption tokens (default: the longest).

    The attention between the streams is computed where both are.
    """
    work = [w for w in step_work(config, grid, text=text) if w.kind != "elementwise"]
    everything = sum(w.flops for w in work)
    computed, saved = report["computed"], 0.0
    if report["kind"] != "attention":
        layers = [w for w in work if w.op != "embedding"]
        for name in (*STREAMS, "joint"):
            done = min(computed.values()) if name == "joint" else computed[name]
            saved += (1 - done) * sum(w.flops for w in layers if w.stage == name)
        return 1 - saved / everything
    for name in STREAMS:
        tokens = grid.video if name == "video" else grid.audio
        linear = 2 * tokens * config.hidden_size**2 * config.depth
        unfolded = sum(not folded for _, folded in prior_axes(config))
        # linear layers that go with each kind, in C x C: q, k, v and output; queries and outputs of two blocks
        linears = {"temporal": 4, "text": 4, "prior": 2 * unfolded}
        for kind in ATTENTIONS:
            own = sum(w.flops for w in work if w.stage == name and w.kind == f"{kind}_attention")
            saved += (1 - computed[name][kind]) * (own + linears[kind] * linear)
    return 1 - saved / everything


# -- clips -------------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """One way of sampling, and what came of it."""

    steps: int
    cache: str | None
    measured: list[Measured] = field(default_factory=list)
    latents: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    computed: list[Row] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def generate(pipe: JavisPipeline, scenes: Sequence[Any], point: Point, seed: int, usual: int) -> None:
    """Make and measure the clips of a point, one at a time, so that a clip's decisions are what is computed."""
    for i, scene in enumerate(scenes):
        last: list[tuple[Tensor, Tensor]] = []

        def keep(_: Any, __: int, ___: float, latents: dict[str, Tensor], last: list[Any] = last) -> None:
            last[:] = [(latents["video_latents"].clone(), latents["audio_latents"].clone())]

        made = pipe(
            caption(scene),
            seed=seed + i,
            steps=point.steps,
            cache=point.cache,
            variant="teacher",
            callback_on_step_end=keep,
        )
        clauses = [dict(source.clause) for source in scene.sources]
        point.measured.append(measure(Clip(clauses, made.video[0], made.audio[0], made.fps, made.sample_rate)))
        point.latents.append(last[0])
        point.seconds.append(made.seconds_per_stage["denoise"])
        share = 1.0
        if made.caches is not None:
            (report,) = made.caches
            point.computed.append(report["computed"])
            grid = token_grid(pipe.model.config, tuple(last[0][0].shape[2:]), tuple(last[0][1].shape[2:]))  # type: ignore[arg-type]
            share = share_of_work(pipe.model.config, grid, report)
        point.work.append(share * point.steps / usual)


def f1(clips: Sequence[Measured]) -> float | None:
    return total_counts(agreement(clip) for clip in clips).f1


def row_of(point: Point, exact: Point, args: Args) -> Row:
    """Means over the clips, a 95 % bootstrap interval of F1 over clips, and the distance from ``exact``."""
    errors = []
    for stream in range(2):
        pairs = [(a[stream].double(), e[stream].double()) for a, e in zip(point.latents, exact.latents, strict=True)]
        errors.append(float(np.mean([float((a - e).square().mean().sqrt() / e.std()) for a, e in pairs])))
    rights = [right for clip in point.measured for checks in clip.checks.values() for right in checks]
    interval, score = bootstrap_interval(point.measured, f1, seed=0), f1(point.measured)
    row: Row = {
        "bench": "caches", "checkpoint": args.checkpoint, "clips": len(point.measured), "seed": args.seed,
        "steps": point.steps, "cache": point.cache, "work": round(float(np.mean(point.work)), 4),
        "f1": None if score is None else round(score, 4),
        "f1_interval": None if interval is None else [round(end, 4) for end in interval],
        "captions_right": round(float(np.mean(rights)), 4), "video_error": round(errors[0], 4),
        "audio_error": round(errors[1], 4), "denoise_s": round(float(np.median(point.seconds)), 3),
    }  # fmt: skip
    if point.computed and isinstance(point.computed[0]["video"], float):
        row["computed"] = {s: round(float(np.mean([done[s] for done in point.computed])), 4) for s in STREAMS}
    elif point.computed:
        row["computed"] = point.computed[0]  # by number of the evaluation: the same for every clip
    return row


def with_control(row: Row, controls: Sequence[Row]) -> Row:
    """The row of a cache with what fewer steps give at its work, interpolated between two numbers of steps."""
    ordered = sorted(controls, key=lambda control: control["work"])
    works = [control["work"] for control in ordered]
    if not ordered or not works[0] <= row["work"] <= works[-1]:
        return row
    return row | {
        f"control_{name}": round(float(np.interp(row["work"], works, [control[name] for control in ordered])), 4)
        for name in ("f1", "captions_right", "video_error", "audio_error")
        if all(control[name] is not None for control in ordered)
    }


# -- polynomials of tea ------------------------------------------------------------------------------------------------


class Changes:
    """The model itself, noting how much it changes from one evaluation of a clip to the next.

    Attributes:
        pairs: by stream, relative changes of the first layer's modulated input and of what all layers add.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.pairs: dict[Stream, list[tuple[float, float]]] = {name: [] for name in STREAMS}
        self._last: tuple[Conditioning, float, dict[Stream, tuple[Tensor, Tensor]]] | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    def denoise(
        self, video: Tensor, audio: Tensor, timestep: Tensor, condition: Conditioning, **options: Any
    ) -> Velocity:
        """As the model's."""
        with self.model.step_context():
            start = self.model.begin(video, audio, timestep, condition, **options)
            x = {"video": start.video, "audio": start.audio}
            for number in range(self.model.config.depth):
                x = {name: self.model.stream(name, number, z, start, condition) for name, z in x.items()}
                x = dict(zip(STREAMS, self.model.meet(number, x["video"], x["audio"], condition), strict=True))
            now = {name: (modulated_input(self.model, name, start), x[name] - getattr(start, name)) for name in STREAMS}
            if self._last is not None and self._last[0] is condition and self._last[1] >= float(timestep[0]):
                for name in STREAMS:
                    changes = [relative_change(a, b, 1) for a, b in zip(now[name], self._last[2][name], strict=True)]
                    self.pairs[name].append((float(changes[0]), float(changes[1])))
            self._last = (condition, float(timestep[0]), now)
            return self.model.finish(x["video"], x["audio"], start, video, audio, timestep, condition)


def fit(pairs: Sequence[tuple[float, float]], degree: int) -> tuple[list[float], float]:
    """Least squares: coefficients, highest power first, and the share of the variance that they explain.

    Raises:
        UsageError: fewer changes than coefficients.
    """
    kept = np.array([pair for pair in pairs if np.isfinite(pair).all()])
    if len(kept) <= degree:
        raise UsageError(f"{len(kept)} changes for a polynomial of degree {degree}; expected more clips or steps")
    powers = np.polyfit(kept[:, 0], kept[:, 1], degree)
    left = kept[:, 1] - np.polyval(powers, kept[:, 0])
    spread = float(np.var(kept[:, 1]))
    return [round(float(p), 6) for p in powers], 1 - float(np.mean(left**2)) / spread if spread else 1.0


def main(args: Args) -> list[Row]:
    """Measure, print, and return the rows."""
    if args.clips < 2 or args.degree < 1 or (args.steps is not None and args.steps < 2):
        raise UsageError("expected at least 2 clips, 2 steps and a polynomial of degree 1")
    console = Console()
    pipe = JavisPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    form = WorldConfig(size=pipe.size, fps=pipe.fps, sample_rate=pipe.sample_rate)
    scenes = held_out_scenes(args.clips // 2, args.seed, config=form)[: 2 * (args.clips // 2)]
    usual = pipe.description["sampling"]["steps"] if args.steps is None else args.steps
    rows: list[Row] = []
    if args.fit:
        recorder = Changes(pipe.model)
        pipe.denoiser = recorder
        for i, scene in enumerate(scenes):
            pipe(caption(scene), seed=args.seed + i, steps=usual, variant="teacher")
        found = {name: fit(recorder.pairs[name], args.degree) for name in STREAMS}
        rows = [{
            "bench": "cache_fit", "checkpoint": args.checkpoint, "clips": len(scenes), "seed": args.seed,
            "steps": usual, "degree": args.degree, "polynomials": {name: powers for name, (powers, _) in found.items()},
            "explained": {name: round(share, 4) for name, (_, share) in found.items()},
        }]  # fmt: skip
        console.print_json(json.dumps({"cache_polynomials": rows[0]["polynomials"]}))
        console.print(rows[0])
    else:
        for text in args.caches:
            parse_cache(text)  # before anything is generated
        points = [Point(usual, None)]
        points += [Point(steps, None) for steps in args.controls if steps < usual]
        points += [Point(usual, text) for text in args.caches]
        for point in points:
            started = time.perf_counter()
            generate(pipe, scenes, point, args.seed, usual)
            row = row_of(point, points[0], args)
            rows.append(row if point.cache is None else with_control(row, [r for r in rows if r["cache"] is None]))
            console.print({k: v for k, v in rows[-1].items() if k not in ("bench", "checkpoint", "seed")})
            console.print(f"{time.perf_counter() - started:.0f} s")
    rows = [{**row, **environment()} for row in rows]
    if args.append:
        append_rows(rows)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Args))
