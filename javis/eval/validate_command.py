"""``javis eval validate``: is the offset found, and do scores rank damaged clips lower? Against planted truth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from javis.console import output, progress_bar
from javis.errors import UsageError
from javis.eval.report_files import check_report_files, write_report


@dataclass(frozen=True, kw_only=True)
class EvalValidateArgs:
    """Measure the measures of synchrony on real clips of the world: offsets of clips whose sound is moved by known
    amounts, and how often the sync score, AV-Align and JavisScore's arithmetic (on features that need no download) rank
    a clip above a damaged one.
    """

    count: int = 32
    """Clips; each is shifted 15 times and damaged in some 80 ways."""
    seed: int = 6_000_000
    """Of the first clip. The measures were developed on seeds from 5,000,000 on."""
    fps: float = 16
    """Frames per second of the clips."""
    seconds: float = 2.0
    """Length of the clips."""
    json: Path | None = None
    """Write the report to this file."""
    append: Path | None = None
    """Add the report with machine, versions and commit as one line to this file (benchmarks/results/<device>.jsonl)."""


def main(args: EvalValidateArgs) -> None:
    """Entry of ``javis eval validate``. Raises `UsageError` for unusable arguments."""
    if not 2 <= args.count <= 100_000:
        raise UsageError(f"--count {args.count}: expected 2 to 100000 clips; damage takes material from another clip")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: expected a whole number >= 0")
    check_report_files(args.json, args.append)
    report = measure(args)
    write_report(report, json_file=args.json, append=args.append)
    for line in lines(report):
        output().print(line)


def measure(args: EvalValidateArgs) -> dict[str, Any]:
    """The report: ``offset`` (see validate_offset.py) and ``ranking`` (see validate.py), json values."""
    from javis.eval import validate
    from javis.eval.optical_flow import flow_method
    from javis.eval.validate import rank_clips, ranking_report, scenes_of
    from javis.eval.validate_offset import offset_report, shift_clips
    from javis.world import WorldConfig

    config = WorldConfig(fps=args.fps, seconds=args.seconds)
    scenes = scenes_of(args.count, args.seed, config)
    with progress_bar("shifting clips", args.count) as advance:
        shifted = shift_clips(scenes, seed=args.seed, progress=advance)
    with progress_bar("damaging clips", args.count) as advance:
        pairs = rank_clips(scenes, seed=args.seed, progress=advance)
    return {
        "kind": "eval_validate",
        "count": args.count,
        "seed": args.seed,
        "world": asdict(config),
        "levels": list(validate.LEVELS),
        "flow": flow_method(),
        "offset": offset_report(shifted, args.count),
        "ranking": ranking_report(pairs, args.count),
    }


def lines(report: dict[str, Any]) -> list[str]:
    """What is printed of a report."""
    offset, ranking = report["offset"], report["ranking"]
    said = [f"offset found within {offset['bound_ms']:g} ms, of clips shifted by -500 to 500 ms (95 % interval):"]
    for name, title in (
        ("clear", "shifts that the true times decide"),
        ("all", "all shifts"),
        ("energy_alone", "the former, by motion energy and onset strength alone"),
    ):
        part = offset[name]
        if part["found"] is not None:
            said.append(f"  {title:54s}{_interval(part['found'])}   {part['shifts']} shifts")
    said.append(f"pairs of a clip and a damaged one ranked right, {ranking['pairs']} pairs (asynchronous twins):")
    for name, part in ranking["scores"].items():
        twins = "-" if part["twins"] is None else _interval(part["twins"])
        said.append(f"  {name:30s}{_interval(part['all'])}   {twins}")
    return said


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f}..{figure['high']:.3f})"
