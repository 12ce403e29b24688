"""``javis eval gate``: the command; what it does is in gate.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from javis.console import output, progress_bar
from javis.errors import FailedError, UsageError
from javis.media import check_writable, write_text


@dataclass(frozen=True, kw_only=True)
class EvalGateArgs:
    """Make the clips of 32 fixed held-out prompts with the checkpoint's own settings, and hold event F1, mean absolute
    offset and caption accuracy to what was recorded. Exit code 1 if one of them is missed.
    """

    checkpoint: str = "demo"
    """Folder with config.json and model.safetensors, or "demo", the built-in model."""
    record: bool = False
    """Record what this checkpoint does as what is to be held from now on."""
    file: Path | None = None
    """The recording (default: gate.json in the checkpoint's folder; the package has that of the built-in one)."""
    limit: int | None = None
    """Only the first so many prompts."""
    batch_size: int = 8
    """Clips generated together."""
    json: Path | None = None
    """Write the verdict to this file."""


def main(args: EvalGateArgs) -> None:
    """Entry of ``javis eval gate``.

    Raises:
        UsageError: unusable arguments, checkpoint or recording. FailedError: a figure is missed.
    """
    if not 1 <= args.batch_size <= 1024:
        raise UsageError(f"batch size must be a whole number from 1 to 1024, got {args.batch_size}")
    if args.limit is not None and (args.limit < 1 or args.record):
        raise UsageError("--limit is a whole number from 1 on, and not for --record, which takes all prompts")
    from javis.eval import gate

    path = args.file or gate.default_file(args.checkpoint)
    for target in ([path] if args.record else []) + ([args.json] if args.json is not None else []):
        check_writable(target)
    recorded = gate.read(path) if path.is_file() or not args.record else None
    from javis.pipeline import JavisPipeline
    from javis.world import WorldConfig

    pipe = JavisPipeline.from_pretrained(args.checkpoint)
    if "size" not in pipe.description["clip"]:
        raise UsageError(f"checkpoint {args.checkpoint!r} is not of the built-in world, whose captions the gate takes")
    form = WorldConfig(size=pipe.size, fps=pipe.fps, sample_rate=pipe.sample_rate)
    prompts = gate.fixed_prompts(form) if args.record or recorded is None else recorded.prompts[: args.limit]
    with progress_bar("making and measuring clips", len(prompts)) as advance:
        rows, shuffled = gate.measure_rows(
            gate.make_clips(pipe, prompts, batch_size=args.batch_size, progress=lambda done: advance(done))
        )
    if args.record:
        _record(args, path, pipe, prompts, rows, shuffled, recorded)
        return
    assert recorded is not None
    verdicts = gate.judge(recorded.rows[: len(rows)], rows)
    _tell(args, recorded, verdicts, len(rows))


def _record(
    args: EvalGateArgs, path: Path, pipe: Any, prompts: Sequence[Any], rows: Sequence[Any], shuffled: float | None,
    before: Any,
) -> None:  # fmt: skip
    from javis.bench_environment import environment
    from javis.clip_files import checkpoint_fingerprint
    from javis.eval import gate
    from javis.variants import choose_variant, variant_sampling

    figures = gate.figures_of(rows)
    f1 = figures["f1"]
    if any(figure is None for figure in figures.values()) or shuffled is None or f1 is None or f1["low"] <= shuffled:
        raise FailedError(
            f"nothing is recorded: event F1 {None if f1 is None else f1['value']} is not above that of shuffled sound, "
            f"{shuffled}; a gate must not hold a checkpoint to chance"
        )
    variant = choose_variant(pipe.description, None, {}).variant
    facts = {
        "checkpoint": args.checkpoint if args.checkpoint == "demo" else Path(args.checkpoint).name,
        "checkpoint_fingerprint": checkpoint_fingerprint(args.checkpoint),
        "weights_sha256": gate.weights_sha256(args.checkpoint),
        "used": {"variant": variant, **variant_sampling(pipe.description, variant)},
        "figures": figures,
        "shuffled_f1": round(shuffled, 4),
        **environment(),
    }
    write_text(path, gate.as_text(prompts, rows, facts))
    say = output().print
    for name, figure in figures.items():
        assert figure is not None
        say(f"recorded {gate.FIGURES[name].label} {figure['value']:g} [{figure['low']:g}, {figure['high']:g}]")
    say(f"shuffled sound: event F1 {shuffled:.3f}")
    if before is not None and [(p.caption, p.seed) for p in before.prompts] == [(p.caption, p.seed) for p in prompts]:
        say("against what was recorded before:")
        for verdict in gate.judge(before.rows, rows):
            say(f"  {verdict.line()}")
    say(f"wrote {path}")


def _tell(args: EvalGateArgs, recorded: Any, verdicts: Sequence[Any], count: int) -> None:
    from javis.eval import gate

    now, then = gate.weights_sha256(args.checkpoint), recorded.facts.get("weights_sha256")
    if args.json is not None:
        report = {
            "kind": "eval_gate_verdict",
            "checkpoint": args.checkpoint,
            "clips": count,
            "weights_sha256": now,
            "recorded_weights_sha256": then,
            "recorded_commit": recorded.facts.get("commit"),
            "figures": [verdict.row() for verdict in verdicts],
        }
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    say = output().print
    for verdict in verdicts:
        say(verdict.line())
    if now != then:
        say("these are other weights than those recorded; 'javis eval gate --record' records them")
    missed = [gate.FIGURES[verdict.name].label for verdict in verdicts if not verdict.held]
    if missed:
        raise FailedError(
            f"the gate is missed by {', '.join(missed)} on {count} clips; find what changed, or, if it is wanted, "
            "record anew with 'javis eval gate --record'"
        )
