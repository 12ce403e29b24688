"""The data doctor, ``javis data check``: every file of a manifest is decoded, and what is wrong is named.

Read in this order: `examine`, `Report`, `CheckArgs` and `main`. The rules are in doctor_rules.py, the reading of files
is in probe.py, what isolates it in workers.py. The manifest that is checked is never written to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from javis.console import output, progress_bar
from javis.data.doctor_rules import CORRECTED, KINDS, Checked, Finding, Tolerances, corrected, diagnose, duplicates
from javis.data.manifest import Manifest, ParsedManifest, parse_manifest
from javis.data.probe import ClipFacts, ClipFiles, measure
from javis.data.workers import Failure, default_processes, isolated_map
from javis.errors import FailedError, UsageError

SHOWN = 3  # names per kind on the terminal; the json has all


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        rows: rows of the manifest, broken ones included. findings: by line. clean: rows without a finding that leaves
            them out, numbers corrected.
    """

    manifest: str
    rows: int
    findings: tuple[Finding, ...]
    clean: Manifest
    keep: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Clips per kind, in the order of `KINDS`."""
        lines = {(finding.kind, finding.line) for finding in self.findings}
        counted = {kind: sum(own == kind for own, _ in lines) for kind in KINDS}
        return {kind: count for kind, count in counted.items() if count}

    def as_json(self) -> dict[str, Any]:
        """The report for machines: counts, and per kind the clips with their lines and reasons."""
        kinds = {
            kind: {
                "meaning": KINDS[kind],
                "clips": count,
                "found": [
                    {"line": f.line, "id": f.id, "path": f.path, "detail": f.detail}
                    for f in self.findings
                    if f.kind == kind
                ],
            }
            for kind, count in self.counts.items()
        }
        return {
            "manifest": self.manifest,
            "rows": self.rows,
            "clean": len(self.clean),
            "kept_although": list(self.keep),
            "kinds": kinds,
        }

    def lines(self) -> list[str]:
        """The report for people."""
        told = [f"{self.manifest}: {self.rows} rows, {len(self.clean)} of them good"]
        for kind, count in self.counts.items():
            own = [finding for finding in self.findings if finding.kind == kind]
            names = ", ".join(f"{f.id or '?'} (line {f.line}: {f.detail[:80]})" for f in own[:SHOWN])
            more = f", and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
            mark = "corrected" if kind in CORRECTED else "kept" if kind in self.keep else "left out"
            told.append(f"  {kind:20s}{count:6d}  {mark}: {names}{more}")
        return told


def examine(
    path: str | os.PathLike[str],
    *,
    tolerances: Tolerances | None = None,
    keep: tuple[str, ...] = (),
    processes: int | None = None,
    timeout: float = 300.0,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Check every clip of a manifest.

    Args:
        path: the manifest, or a folder of shards; only read.
        tolerances: from when on a difference is a fault.
        keep: kinds that leave no clip out.
        processes: that decode, one core each; None: one per core.
        timeout: seconds for one clip; one that takes longer is unreadable.
        progress: called with the number of clips done.

    Raises:
        UsageError: not a manifest, or unknown kinds.
    """
    unknown = sorted(set(keep) - set(KINDS))
    if unknown:
        raise UsageError(f"unknown kind {unknown[0]!r}; expected some of {', '.join(KINDS)}")
    if not timeout > 0:
        raise UsageError(f"timeout must be a number of seconds above 0, got {timeout}")
    parsed, tolerances = _parsed(path), tolerances or Tolerances()
    checked = _measure_all(parsed, processes or default_processes(), timeout, progress)
    findings = [
        Finding("broken_row", row.line, row.cells.get("id", ""), row.cells.get("path", ""), row.message)
        for row in parsed.broken
    ]
    for clip in checked:
        findings += diagnose(clip, tolerances)
    harmless = {*CORRECTED, *keep}
    found_alone = {finding.line for finding in findings if finding.kind not in harmless}
    findings += duplicates(checked, found_alone)
    left_out = {finding.line for finding in findings if finding.kind not in harmless}
    order = {kind: place for place, kind in enumerate(KINDS)}
    findings.sort(key=lambda finding: (finding.line, order[finding.kind]))
    clean = tuple(corrected(clip.row, clip.facts) for clip in checked if clip.line not in left_out)
    return Report(str(path), len(parsed.rows) + len(parsed.broken), tuple(findings), Manifest(clean), tuple(keep))


def _parsed(path: str | os.PathLike[str]) -> ParsedManifest:
    """The rows of a CSV file or of a folder of shards, whose n-th clip is on line n + 1."""
    if not Path(path).is_dir():
        return parse_manifest(path)
    from javis.data.shards import ShardedManifest

    rows = ShardedManifest.open(path).rows
    return ParsedManifest(rows, tuple(range(2, len(rows) + 2)), (), ())


def _measure_all(
    parsed: ParsedManifest, processes: int, timeout: float, progress: Callable[[int], None] | None
) -> list[Checked]:
    files = [ClipFiles(row.path, row.audio_path) for row in parsed.rows]
    facts: list[ClipFacts | None] = [None] * len(files)
    answers = isolated_map(measure, files, processes=min(processes, max(1, len(files))), timeout=timeout)
    for done, (index, answer) in enumerate(answers, 1):
        if isinstance(answer, Failure):
            answer = ClipFacts(None, None, "", (("unreadable", answer.reason),))
        facts[index] = answer
        if progress is not None:
            progress(done)
    return [
        Checked(line, row, own)
        for line, row, own in zip(parsed.lines, parsed.rows, facts, strict=True)
        if own is not None
    ]


@dataclass(frozen=True, kw_only=True)
class CheckArgs:
    """Decode every clip of a manifest and say what is wrong with it; write a manifest without the faulty ones."""

    manifest: tyro.conf.Positional[Path]
    """CSV file with the official columns ('javis data make' writes one), or a folder of shards; never changed."""
    out: Path | None = None
    """Write the good rows here, with corrected numbers."""
    json: Path | None = None
    """Write the whole report here."""
    keep: tuple[str, ...] = ()
    """Kinds of faults that leave no clip out, such as: silence no_caption."""
    processes: int | None = None
    """Decoding processes; one per core by default."""
    timeout: float = 300.0
    """Seconds for one clip."""
    strict: bool = False
    """Exit with 1 if a clip is left out."""
    tolerances: tyro.conf.OmitArgPrefixes[Tolerances] = field(default_factory=Tolerances)


def main(args: CheckArgs) -> None:
    """Run the command."""
    from javis.media import check_writable, write_text

    for target in (args.out, args.json):
        if target is not None:
            if target.exists() and args.manifest.exists() and target.samefile(args.manifest):
                raise UsageError(f"{target} is the manifest that is checked; give another name")
            check_writable(target)
    total = len(_parsed(args.manifest).rows)
    with progress_bar("checking clips", max(1, total)) as advance:
        report = examine(
            args.manifest,
            tolerances=args.tolerances,
            keep=args.keep,
            processes=args.processes,
            timeout=args.timeout,
            progress=advance,
        )
    if args.out is not None:
        report.clean.write(args.out)
    if args.json is not None:
        write_text(args.json, json.dumps(report.as_json(), indent=1) + "\n")
    for line in report.lines():
        output().print(line)
    left_out = report.rows - len(report.clean)
    if args.strict and left_out:
        raise FailedError(f"{left_out} of {report.rows} clips are left out; the report above says why")
