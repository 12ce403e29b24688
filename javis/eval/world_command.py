"""``javis eval world``: score a checkpoint on prompts and seeds its training never saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from javis.console import output, progress_bar
from javis.errors import UsageError
from javis.eval.report_files import check_report_files, write_report


@dataclass(frozen=True, kw_only=True)
class EvalWorldArgs:
    """Generate clips for held-out prompts of the synthetic world and measure them: event F1 with the shuffled-sound
    control, offsets, attributes; beside it the same for real clips of the same scenes, which is the detectors' ceiling.
    """

    checkpoint: str = "demo"
    """Folder with config.json and model.safetensors, or "demo", the built-in model."""
    count: int = 64
    """Clips with one source, and as many with two."""
    seed: int = 1_000_000
    """Of the first scene and clip."""
    steps: int | None = None
    """Denoising steps (default: the checkpoint's)."""
    guidance: float | None = None
    """Classifier-free guidance, 1 = none (default: the checkpoint's)."""
    audio_guidance: float | None = None
    """The same of the sound (default: --guidance if given, else the checkpoint's)."""
    order: Literal["together", "sound_first"] | None = None
    """Make picture and sound side by side, or the sound first (default: the checkpoint's)."""
    variant: Literal["teacher", "student"] | None = None
    """Which model of the checkpoint (default: the one that `javis sample` with these arguments takes)."""
    ablate: Literal["none", "prior", "bidirectional", "both"] = "none"
    """Set the priors to zero, leave out the bidirectional attention, or both."""
    split: Literal["held_out", "train", "any"] = "held_out"
    """Combinations that training may not see, those it may, or all."""
    batch_size: int = 8
    """Clips generated together."""
    ceiling: bool = True
    """Measure real clips of the same scenes, too."""
    json: Path | None = None
    """Write the report to this file."""
    append: Path | None = None
    """Add the report with machine, versions and commit as one line to this file (benchmarks/results/<device>.jsonl)."""


def main(args: EvalWorldArgs) -> None:
    """Entry of ``javis eval world``. Raises `UsageError` for unusable arguments or checkpoints."""
    check_report_files(args.json, args.append)
    if not 1 <= args.batch_size <= 1024:
        raise UsageError(f"batch size must be a whole number from 1 to 1024, got {args.batch_size}")
    from javis.clip_files import checkpoint_fingerprint
    from javis.eval.world_report import run
    from javis.pipeline import JavisPipeline

    pipe = JavisPipeline.from_pretrained(args.checkpoint)
    ablate = {"none": (), "both": ("prior", "bidirectional")}.get(args.ablate, (args.ablate,))
    with progress_bar("evaluating", 100) as advance:
        report = run(
            pipe,
            count=args.count,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            audio_guidance=args.audio_guidance,
            order=args.order,
            variant=args.variant,
            ablate=ablate,
            ceiling=args.ceiling,
            split=args.split,
            batch_size=args.batch_size,
            progress=lambda done, total: advance(100 * done / total),
        )
    report["checkpoint"] = args.checkpoint
    report["checkpoint_fingerprint"] = checkpoint_fingerprint(args.checkpoint)
    write_report(report, json_file=args.json, append=args.append)
    for line in _lines(report):
        output().print(line)


def _lines(value: Any, name: str = "") -> list[str]:
    """Nested figures as lines of "a.b.c   figure"."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in _lines(inner, f"{name}.{key}" if name else str(key))]
    return [f"{name:48s}{'-' if value is None else value}"]
