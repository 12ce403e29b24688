"""``javis eval negatives``: the audit of a prior estimator. The work is in negatives.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from javis.console import output, progress_bar
from javis.errors import UsageError
from javis.eval.report_files import check_report_files, write_report


@dataclass(frozen=True, kw_only=True)
class EvalNegativesArgs:
    """On clips of the world with known truth, say how often the discriminator and the hinge call each kind of negative
    asynchronous, before training (random weights) and after it.
    """

    checkpoint: str = "demo"
    """Folder of a checkpoint that "javis train prior" wrote, or "demo", the built-in model."""
    count: int = 400
    """Clips, each with one negative of every kind."""
    calibration: int = 400
    """Other true clips, which set the margins of the discriminator."""
    seed: int = 1_500_000_000
    """Of the first clip."""
    split: Literal["any", "train", "held_out"] = "any"
    """Combinations of colour, shape and motion: any, those of training, or those it has never seen."""
    before: bool = True
    """Audit the same estimator with random weights, too."""
    json: Path | None = None
    """Write the report to this file."""
    append: Path | None = None
    """Add the report to this file, one line (benchmarks/results/<device>.jsonl)."""


def main(args: EvalNegativesArgs) -> None:
    """Entry of ``javis eval negatives``.

    Raises:
        UsageError: unusable arguments, or a checkpoint without the estimator's embedding network.
    """
    for name in ("count", "calibration"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: expected a whole number >= 0")
    check_report_files(args.json, args.append)
    report = measured(args)
    write_report(report, json_file=args.json, append=args.append)
    _print(report)


def measured(args: EvalNegativesArgs) -> dict[str, Any]:
    import torch

    from javis.bench_environment import environment
    from javis.eval.negatives import audit, below_bar
    from javis.model.prior import PriorEstimator
    from javis.train.prior_run import load_init, text_encoder, world_format

    pipe = load_init(args.checkpoint)
    if not pipe.prior.config.encode_va:
        raise UsageError(
            f"checkpoint {args.checkpoint!r} keeps no embedding network and discriminator, which sampling does not "
            "need; train them with 'javis train prior --out DIR' and audit --checkpoint DIR/checkpoint"
        )
    world = world_format(pipe)
    estimators = {"after": pipe.prior}
    if args.before:
        torch.manual_seed(0)
        estimators = {"before": PriorEstimator(pipe.prior.config), **estimators}
    with progress_bar("clips", args.count + args.calibration) as advance:
        found = audit(
            estimators,
            pipe.video_codec,
            pipe.audio_codec,
            text_encoder(pipe),
            world,
            count=args.count,
            calibration=args.calibration,
            seed=args.seed,
            split=args.split,
            progress=advance,
        )
    facts = {name: getattr(args, name) for name in ("checkpoint", "count", "calibration", "seed", "split")}
    facts["checkpoint"] = Path(args.checkpoint).name if args.checkpoint != "demo" else "demo"
    missed = below_bar(found["after"])
    return {
        "kind": "eval_negatives",
        **facts,
        "world": asdict(world),
        "parameters": sum(p.numel() for p in pipe.prior.parameters()),
        **found,
        "bar": 0.9,
        "below_bar": missed,
        **environment(),
    }


def _print(report: dict[str, Any]) -> None:
    say = output().print
    for name in ("before", "after"):
        if name not in report:
            continue
        say(f"{name} training: called asynchronous (95 % interval), {report['count']} clips")
        for kind, rates in report[name]["kinds"].items():
            cells = [f"{label} {_cell(rates[key])}" for key, label in (("discriminator", "disc"), ("hinge", "hinge"))]
            own = f"own axis {rates['own_axis']['rate']:.3f}, {rates['hinge_own_axis']['rate']:.3f}"
            own += f"   hinge alone {rates['hinge_alone']['rate']:.3f}"
            say(f"  {kind:16} {'   '.join(cells)}   {own}")
        synchronous = report[name]["synchronous"]
        cells = [
            f"{label} {_cell(synchronous[key])}"
            for key, label in (("discriminator", "disc"), ("hinge_alone", "hinge alone"))
        ]
        say(f"  true clips called synchronous: {', '.join(cells)}")
    missed = report["below_bar"]
    say("every kind at 0.9 or above" if not missed else f"below 0.9: {', '.join(missed)}")


def _cell(rate: dict[str, Any]) -> str:
    return f"{rate['rate']:.3f} ({rate['low']:.3f}..{rate['high']:.3f})"
