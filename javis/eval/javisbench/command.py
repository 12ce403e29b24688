"""``javis eval javisbench``: samples of a benchmark's prompts, or of a data set in folders, against its metrics."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from javis.console import output, progress_bar
from javis.errors import UsageError
from javis.eval.report_files import check_report_files, write_report
from javis.media import check_writable, remove_leftovers, write_text


@dataclass(frozen=True, kw_only=True)
class JavisBenchArgs:
    """Evaluate samples of the prompts of a CSV file (JavisBench.csv or one of its form), or of a data set without
    prompts: figures with bootstrap intervals and a shuffled control, of all clips and of each category.

    Metrics whose weights are not there are listed as skipped, with what to put where. Writes results.json, results.html
    and results.tex to --out, and what was measured of each clip, so that a run that was ended goes on.
    """

    samples: Path | None = None
    """Folder with the samples: sample_0000.mp4 by row of the CSV file, or named by id; a wav of the same name is the
    sound."""
    prompts: Path | None = None
    """JavisBench.csv, or a CSV file with its columns; "sample": 20 prompts for the built-in model."""
    layout: Literal["prompts", "landscape", "aist", "folder"] = "prompts"
    """Where there are no prompts: clips in a folder for each scene (Landscape), with the genre in their names (AIST++),
    or in any tree."""
    reference: Path | None = None
    """Real clips for Frechet and kernel distances: the official cache (.pt), one of this command (.safetensors), or a
    folder."""
    weights: Path | None = None
    """Folder with a folder of weights for each extractor (docs/metrics.md)."""
    out: Path | None = None
    """Folder for the results (default: out/javisbench/<samples>)."""
    name: str | None = None
    """What the results are of, for tables (default: the name of --samples)."""
    metrics: tuple[str, ...] = ()
    """Only these (default: all)."""
    protocol: Literal["corrected", "official"] = "corrected"
    """Arithmetic of the metrics: ours, or the official code's with its accidents (docs/metrics.md)."""
    seconds: float | None = None
    """Only the first so many seconds of each clip."""
    window_seconds: float = 2.0
    """Length of a window of JavisScore."""
    window_overlap: float = 1.5
    """By how much they overlap."""
    categories: Path | None = None
    """The official category.json, if its order is not that of the paper."""
    processes: int | None = None
    """Clips measured at the same time (default: one for each core; 1 on a GPU)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where extractors run."""
    timeout: float = 600.0
    """Seconds after which a clip is given up."""
    append: Path | None = None
    """Add the results, machine, versions and commit as one line to this file (benchmarks/results/<device>.jsonl)."""
    write_sample: Path | None = None
    """Write the 20 prompts for the built-in model to this file, and stop: javis sample --prompts takes it."""


def main(args: JavisBenchArgs) -> None:
    """Entry of ``javis eval javisbench``. Raises `UsageError` for unusable arguments or input."""
    from javis.eval.javisbench import SAMPLE_PROMPTS

    if args.write_sample is not None:
        write_text(args.write_sample, SAMPLE_PROMPTS.read_text(encoding="utf-8"))
        output().print(f"{args.write_sample}: 20 prompts; make them with: javis sample --prompts {args.write_sample}")
        return
    if args.samples is None:
        raise UsageError("expected --samples FOLDER with the clips to evaluate")
    _check(args)
    out = args.out or Path("out/javisbench") / (args.samples.name or "samples")
    for name in ("results.json", "results.html", "results.tex"):
        check_writable(out / name)
    remove_leftovers(out)
    check_report_files(args.append)

    from rich.console import Console

    from javis.data.workers import default_processes
    from javis.eval.javisbench.config import Config
    from javis.eval.javisbench.harness import evaluate
    from javis.eval.javisbench.measure import Options
    from javis.eval.javisbench.page import page
    from javis.eval.javisbench.text import WIDTH, latex, render

    prompts = SAMPLE_PROMPTS if args.prompts == Path("sample") and not args.prompts.exists() else args.prompts
    options = Options(
        seconds=args.seconds,
        window_seconds=args.window_seconds,
        window_overlap=args.window_overlap,
        protocol=args.protocol,
        weights="" if args.weights is None else str(args.weights),
        device=args.device,
    )
    config = Config(
        samples=args.samples,
        out=out,
        prompts=prompts,
        layout=args.layout,
        reference=args.reference,
        categories=args.categories,
        options=options,
        metrics=args.metrics,
        processes=args.processes or (1 if args.device == "cuda" else default_processes()),
        timeout=args.timeout,
        name=args.name or args.samples.resolve().name,
    )
    with progress_bar("measuring clips", 100) as advance:
        found = evaluate(config, lambda done, of: advance(100 * done / max(1, of)))
    write_text(out / "results.tex", latex(found.results))
    write_text(out / "results.html", page(found))
    write_text(out / "results.json", json.dumps(found.results, indent=1) + "\n")
    write_report(_row(found.results), append=args.append)
    render(found.results, Console() if sys.stdout.isatty() else Console(width=WIDTH))
    output().print(f"{out / 'results.html'}, results.json, results.tex")


def _row(results: dict[str, object]) -> dict[str, object]:
    """What a file of results keeps of a report."""
    left_out = ("samples", "prompts", "reference", "problems")  # paths of a machine; names of clips
    problems = {kind: problem["count"] for kind, problem in results["problems"].items()}  # type: ignore[attr-defined]
    row = {key: value for key, value in results.items() if key not in left_out}
    row["skipped"] = list(results["skipped"])  # type: ignore[call-overload]  # the reasons name folders
    return {**row, "kind": "eval_javisbench", "problems": problems}


def _check(args: JavisBenchArgs) -> None:
    if args.processes is not None and not 1 <= args.processes <= 1024:
        raise UsageError(f"--processes {args.processes}: expected a whole number from 1 to 1024")
    for name in ("seconds", "timeout", "window_seconds"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e6:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    if not 0 <= args.window_overlap < args.window_seconds:
        raise UsageError(
            f"--window-overlap {args.window_overlap}: expected 0 or more, and less than --window-seconds "
            f"({args.window_seconds:g})"
        )
    if args.weights is not None and not args.weights.is_dir():
        raise UsageError(f"no such folder: {args.weights}; expected a folder with weights of extractors")
