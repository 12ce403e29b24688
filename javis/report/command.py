"""``javis report RUN``: the command."""

from __future__ import annotations

import datetime
import subprocess
from dataclasses import dataclass
from pathlib import Path

import tyro

import javis
from javis.console import output, progress_bar
from javis.errors import UsageError
from javis.media import check_writable, write_text


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Write one HTML page that needs no network and no other file: plots, tables, clips that can be played.

    RUN is a training run, a folder of clips as `javis sample` or `javis world make` writes them, the output folder of
    an evaluation, or a single json, jsonl or mp4.
    """

    run: tyro.conf.Positional[Path]
    """What to report."""
    out: Path | None = None
    """The page (default: report.html in RUN, or beside it if it is a file)."""
    eval: tuple[Path, ...] = ()
    """Evaluations of it that lie elsewhere, such as the file of `javis eval sync --json`."""
    title: str | None = None
    """Heading of the page (default: the name of RUN)."""
    max_mb: float = 40.0
    """Clips and pictures in the page, altogether. A page is a third larger than what is in it."""
    max_clip_mb: float = 8.0
    """The largest single clip or picture that is put into the page."""


def main(args: ReportArgs) -> None:
    """Entry of ``javis report``. Raises `UsageError` for unusable arguments and a folder with nothing to report."""
    for name in ("max_mb", "max_clip_mb"):
        if not 0 <= getattr(args, name) <= 2000:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number from 0 to 2000")
    from javis.report.embed import Embedder
    from javis.report.page import page
    from javis.report.read import read_run

    run = read_run(args.run, args.eval)
    out = args.out or (args.run / "report.html" if args.run.is_dir() else args.run.with_suffix(".html"))
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {str(out)!r} must be a file name ending in .html")
    check_writable(out)
    embedder = Embedder(round(args.max_mb * 1e6), round(args.max_clip_mb * 1e6))
    title = args.title or f"javis: {args.run.resolve().name}"
    with progress_bar("writing the page", 1):
        text = page(run, embedder, title=title, made=_made())
    write_text(out, text)
    say = output().print
    for name, why in [*run.problems, *embedder.broken]:
        say(f"left out: {name}: {why}")
    if embedder.left_out:
        say(
            f"{len(embedder.left_out)} clips or pictures do not fit (--max-mb {args.max_mb:g}, --max-clip-mb "
            f"{args.max_clip_mb:g}); the page says which"
        )
    say(f"{out}  {len(text.encode()) / 1e6:.2f} MB")


def _made() -> dict[str, str]:
    """Date, version and commit of what writes the page; not those of the run."""
    facts = {
        "written": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "javis": javis.__version__,
    }
    command = ["git", "-C", str(Path(javis.__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        facts["commit"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):  # an installed package is no checkout
        pass
    return facts
