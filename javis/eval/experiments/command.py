"""``javis eval experiments``: runs experiments by name, and writes their figures, pictures and pages."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from javis.console import output
from javis.errors import UsageError
from javis.eval.experiments import EXPERIMENTS
from javis.eval.experiments.common import Context, needed
from javis.eval.report_files import check_report_files, write_report
from javis.media import write_text
from javis.requests import MAX_STEPS


@dataclass(frozen=True, kw_only=True)
class ExperimentsArgs:
    """Experiments on a checkpoint of the built-in world (docs/experiments.md): priors, attention, negatives, alignment,
    multi_event, collapse. Each writes OUT/NAME.json, .md and .png. Clips are made with its teacher, are measured one by
    one and kept in OUT, so that an interrupted run goes on.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Experiments to run, or "all"."""
    checkpoint: str = "demo"
    """Folder with config.json and model.safetensors, or "demo", the built-in model."""
    prior_checkpoint: str | None = None
    """Folder that "javis train prior" wrote: alignment and negatives need its embedding network."""
    count: int | None = None
    """Prompts of a kind, or clips (default: the experiment's own)."""
    seed: int = 3_000_000
    """Of the first prompt and clip of priors and multi_event; the others have seeds of their own."""
    steps: int = 16
    """Evaluations of the model for a clip."""
    batch_size: int = 8
    """Clips generated together."""
    out: Path = Path("out/experiments")
    """Folder for what is written."""
    append: Path | None = None
    """Add a row for each experiment to this file (benchmarks/results/<device>.jsonl)."""
    figures: Path | None = None
    """Write the pictures into this folder, too (docs/img), as experiments-NAME.png."""


def main(args: ExperimentsArgs) -> None:
    """Entry of ``javis eval experiments``.

    Raises:
        UsageError: unusable arguments, or a checkpoint that lacks what an experiment needs.
    """
    names = chosen(args)
    from javis.bench_environment import environment
    from javis.clip_files import checkpoint_fingerprint

    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        module = importlib.import_module(EXPERIMENTS[name])
        context = Context(
            checkpoint=args.checkpoint,
            prior_checkpoint=args.prior_checkpoint,
            count=module.COUNT if args.count is None else args.count,
            seed=args.seed,
            steps=args.steps,
            batch_size=args.batch_size,
            out=args.out,
            environment=environment(),
        )
        figures = module.run(context)
        facts: dict[str, Any] = {
            "kind": "eval_experiment",
            "experiment": name,
            "checkpoint": args.checkpoint if args.checkpoint == "demo" else Path(args.checkpoint).name,
            "checkpoint_fingerprint": checkpoint_fingerprint(args.checkpoint),
            "count": context.count,
            "seed": args.seed,
            "steps": args.steps,
        }
        keep(args, name, {**facts, **figures, **context.environment})


def keep(args: ExperimentsArgs, name: str, row: dict[str, Any]) -> None:
    """Write what an experiment found, and say it."""
    module = importlib.import_module(EXPERIMENTS[name])
    text = module.section(row)
    write_text(args.out / f"{name}.json", json.dumps(row, indent=1) + "\n")
    write_text(args.out / f"{name}.md", f"# {module.TITLE}\n\n{text}")
    module.plot(row, args.out / f"{name}.png")
    if args.figures is not None:
        args.figures.mkdir(parents=True, exist_ok=True)
        for picture in sorted(args.out.glob(f"{name}*.png")):
            target = args.figures / f"experiments-{picture.name}"
            target.write_bytes(picture.read_bytes())
    write_report(row, append=args.append)
    output().print(f"{module.TITLE}\n\n{text}")


def chosen(args: ExperimentsArgs) -> list[str]:
    """The experiments that were asked for, each once, in order.

    Raises:
        UsageError: an unknown name, or a number out of range.
    """
    names = list(EXPERIMENTS) if "all" in args.names else list(dict.fromkeys(args.names))
    for name in names:
        if name not in EXPERIMENTS:
            raise UsageError(f"there is no experiment {name[:40]!r}; expected some of {', '.join(EXPERIMENTS)}, or all")
    if not names:
        raise UsageError(f"no experiment was named; expected some of {', '.join(EXPERIMENTS)}, or all")
    limits = {"count": (2, 100_000), "steps": (1, MAX_STEPS), "batch_size": (1, 1024), "seed": (0, 2**62)}
    for option, (low, high) in limits.items():
        value = getattr(args, option)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{option.replace('_', '-')} {value}: expected a whole number from {low} to {high}")
    check_report_files(args.append)
    if {"alignment", "negatives"} & set(names):
        needed(args.prior_checkpoint)
    return names
