"""``javis eval steps``: quality against steps on held-out prompts, for teacher and student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from javis.console import output, progress_bar
from javis.errors import UsageError
from javis.eval.report_files import check_report_files, write_report
from javis.requests import MAX_STEPS

if TYPE_CHECKING:
    from javis.eval.steps_points import Point, Setting


@dataclass(frozen=True, kw_only=True)
class EvalStepsArgs:
    """Generate clips for held-out prompts of the synthetic world with few and with many steps, measure them, and say
    which bars are held: event F1 with the shuffled-sound control, offsets, caption accuracy, Frechet distances to real
    clips, seconds and evaluations of the model per clip. Goes on where it was interrupted.
    """

    checkpoint: str = "demo"
    """Folder with config.json and model.safetensors, or "demo", the built-in model."""
    variant: Literal["both", "teacher", "student"] = "both"
    """The teacher, the student, or both as far as the checkpoint has them."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 30)
    """Numbers of steps to measure."""
    count: int = 64
    """Prompts with one source, as many with two, a quarter of it with an off-screen source, an eighth silent."""
    seed: int = 3_000_000
    """Of the first prompt and clip. Nothing was ever chosen on the default."""
    limit: int | None = None
    """Only the first so many prompts, of all kinds. A later run without it goes on behind them."""
    split: Literal["held_out", "train", "any"] = "held_out"
    """Combinations that training may not see, those it may, or all."""
    solver: str | None = None
    """Solver (default: the checkpoint's)."""
    order: str | None = None
    """"together" or "sound_first" (default: the checkpoint's)."""
    guidance: float | None = None
    """Guidance, 1 = none (default: the checkpoint's)."""
    audio_guidance: float | None = None
    """The same of the sound (default: --guidance if given, else the checkpoint's)."""
    option: tuple[str, ...] = ()
    """More arguments of the pipeline's call, values in JSON: --option uncond_every=2 guidance_interval=[300,950]"""
    batch_size: int = 8
    """Clips generated together."""
    alone: int = 3
    """Clips of each point that are made once more, one at a time, for the seconds of a single clip."""
    ceiling: bool = True
    """Measure real clips of the same prompts, too, plain and through the codecs."""
    out: Path = Path("out/eval_steps")
    """Folder where every measured clip is kept, a file for each point."""
    json: Path | None = None
    """Write rows and bars to this file."""
    append: Path | None = None
    """Add rows and bars to this file, one line each (benchmarks/results/<device>.jsonl)."""
    plot: Path | None = None
    """Draw the curve here, as PNG."""
    from_rows: Path | None = None
    """Measure nothing: draw --plot from the rows of this file."""


def main(args: EvalStepsArgs) -> None:
    """Entry of ``javis eval steps``. Raises `UsageError` for unusable arguments or checkpoints."""
    _check(args)
    if args.from_rows is not None:
        _plot_rows(args.from_rows, args.plot)
        return
    points, found, facts = _measure(args)
    from javis.bench_environment import environment
    from javis.eval.steps_report import bars, row_of

    rows = [row_of(point, facts) for point in points]
    verdicts = bars(found)
    if verdicts:
        rows.append({"kind": "eval_steps_bars", **facts, "bars": [bar.row() for bar in verdicts], **environment()})
    write_report(rows, json_file=args.json, append=args.append)
    if args.plot is not None:
        from javis.eval.steps_plot import plot

        plot([row_of(point, facts) for point in found], args.plot)
    for row in rows:
        if row["kind"] == "eval_steps":
            output().print(line_of(row))
    for bar in verdicts:
        output().print(bar.line())


def _measure(args: EvalStepsArgs) -> tuple[list[Point], list[Point], dict[str, Any]]:
    """Points of this run; the same and all others in the folder of these prompts and weights; what rows share."""
    from javis.bench_environment import environment
    from javis.clip_files import checkpoint_fingerprint
    from javis.eval.steps_points import PointFile, check_options, make_point, points_in, variant_fingerprint
    from javis.eval.steps_prompts import prompts
    from javis.pipeline import JavisPipeline
    from javis.world import WorldConfig

    options = options_of(args)
    pipe = JavisPipeline.from_pretrained(args.checkpoint)
    check_options(pipe, options)
    form = {"size": pipe.size, "fps": pipe.fps, "sample_rate": pipe.sample_rate}
    chosen = prompts(args.count, args.seed, split=args.split, config=WorldConfig(**form))[: args.limit]
    key = {"count": args.count, "seed": args.seed, "split": args.split, **form}
    fingerprint_of = cache(partial(variant_fingerprint, args.checkpoint))
    settings = settings_of(args, options, "student" in pipe.description)
    args.out.mkdir(parents=True, exist_ok=True)
    points, done = [], 0
    with progress_bar("measuring clips", len(settings) * len(chosen)) as advance:

        def progress(more: int) -> None:
            nonlocal done
            done += more
            advance(done)

        for setting in settings:
            file = PointFile(args.out, setting, fingerprint_of(setting.variant), key)
            point = make_point(
                pipe,
                file,
                chosen,
                batch_size=args.batch_size,
                alone=args.alone,
                environment=environment(),
                progress=progress,
            )
            points.append(point.first(len(chosen)))
    mine = [point.setting for point in points]
    others = [point for point in points_in(args.out, fingerprint_of, key) if point.setting not in mine]
    facts = {
        "checkpoint": args.checkpoint,
        "checkpoint_fingerprint": checkpoint_fingerprint(args.checkpoint),
        "count": args.count,
        "seed": args.seed,
        "split": args.split,
    }
    return points, points + [point.first(len(chosen)) for point in others], facts


def settings_of(args: EvalStepsArgs, options: Mapping[str, Any], has_student: bool) -> list[Setting]:
    """What is to be measured, in order.

    Raises:
        UsageError: the student of a checkpoint that has none.
    """
    from javis.eval.steps_points import CODEC, REAL, Setting
    from javis.eval.steps_report import STUDENT, TEACHER

    if args.variant == STUDENT and not has_student:
        raise UsageError(f"checkpoint {args.checkpoint!r} has no student; expected --variant teacher, or another one")
    variants = [name for name in (TEACHER, STUDENT) if args.variant in ("both", name)]
    if not has_student:
        variants = [TEACHER]
    settings = [Setting(name, steps, dict(options)) for name in variants for steps in dict.fromkeys(args.steps)]
    return settings + ([Setting(REAL, None), Setting(CODEC, None)] if args.ceiling else [])


def options_of(args: EvalStepsArgs) -> dict[str, Any]:
    """Arguments of the pipeline's call that were given.

    Raises:
        UsageError: an --option that is not NAME=VALUE.
    """
    named = {name: getattr(args, name) for name in ("solver", "order", "guidance", "audio_guidance")}
    options = {name: value for name, value in named.items() if value is not None}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--option {text[:60]!r} is unusable; expected NAME=VALUE such as order=together")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _check(args: EvalStepsArgs) -> None:
    check_report_files(args.json, args.append, args.plot)
    if args.from_rows is not None and args.plot is None:
        raise UsageError("--from-rows draws a picture and needs --plot FILE.png")
    if not args.steps or not all(1 <= steps <= MAX_STEPS for steps in args.steps):
        raise UsageError(f"--steps {' '.join(map(str, args.steps))}: expected whole numbers from 1 to {MAX_STEPS}")
    limits = {"count": (1, 100_000), "batch_size": (1, 1024), "alone": (0, 1000), "limit": (1, 1_000_000)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected a whole number from {low} to {high}")


def _plot_rows(source: Path, target: Path | None) -> None:
    from javis.eval.steps_plot import newest_rows, plot

    assert target is not None
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read rows from {source}: {error}; expected one JSON object per line") from None
    chosen = newest_rows(rows)
    if not chosen:
        raise UsageError(
            f"{source} has no row of kind eval_steps; expected a file that 'javis eval steps --append' wrote"
        )
    plot(chosen, target)


def line_of(row: Mapping[str, Any]) -> str:
    """One row for people."""
    settings = [row["variant"], *([f"{row['steps']} steps"] if row["steps"] else [])]
    settings += [f"{name} {value}" for name, value in row["options"].items()]
    figures = [f"F1 {_number(row['f1'], 3)}"]
    if row["shuffled_f1"] is not None:
        figures.append(f"shuffled {row['shuffled_f1']:.3f}")
    figures += [f"offset {_number(row['mean_abs_offset_ms'], 1)} ms", f"caption {_number(row['accuracy'], 3)}"]
    distances = [f"{name} {found['corrected']:.2f}" for name, found in row["frechet"].items() if found is not None]
    figures += [f"Frechet {' '.join(distances)}"] if distances else []
    for name, unit in (("seconds_per_clip", "s"), ("seconds_alone", "s alone"), ("forwards_per_clip", "evaluations")):
        if row[name] is not None:
            figures.append(f"{row[name]:.3g} {unit}")
    return f"{', '.join(settings):24s} " + "  ".join(figures)


def _number(figure: Mapping[str, float] | None, digits: int) -> str:
    if figure is None:
        return "-"
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"
