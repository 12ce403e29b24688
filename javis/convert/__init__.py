"""``javis convert``: official checkpoints into the component folders of a javis checkpoint.

>>> from javis.convert import convert
>>> report = convert("JavisDiT-v0.1-jav", "checkpoint")

read.py opens foreign weights without running them, kinds.py tells what they are, dit.py, prior.py and their like plan
which tensor becomes which, report.py accounts for all of them, write.py writes folders that are complete or not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from javis.console import one_line
from javis.convert.kinds import KINDS, check_kind, detect
from javis.convert.merge import Merged, existing
from javis.convert.read import Checkpoint, WeightSource
from javis.convert.report import Report, account
from javis.convert.write import Writer, check_destination, leftovers, staged, write_index
from javis.errors import FailedError, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5_000_000_000
ACCOUNT = "conversion.json"  # in every component folder: where its tensors came from


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    kind: str = "auto",
    strict: bool = True,
    dtype: str | None = None,
    overwrite: bool = False,
    merge: bool = False,
    entry: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[float], None] | None = None,
) -> Report:
    """Convert an official checkpoint into component folders of ``destination``.

    Args:
        source: weights file, index file, or a folder with either.
        destination: folder of the checkpoint; components of other conversions in it stay.
        kind: one of :data:`KINDS`, or "auto".
        strict: every tensor must have its place and every place its tensor; otherwise what fits is converted.
        dtype: "float32", "bfloat16" or "float16" for floating point tensors; None keeps theirs.
        overwrite: replace components that are there.
        merge: complete the transformer that is there, which has one branch only, by this one.
        entry: the part of a pickle to take, if it holds several ("ema", "model").
        max_shard_bytes: a larger component is written as shards with an index.
        progress: called with the share of the tensors that is written, 0..1.

    Raises:
        UsageError: unusable arguments or source. FailedError: tensors without a place or places without a tensor
            (strict), values that cannot be kept (strict), a full disk. Nothing is written in either case but the
            account beside the destination.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}, or none to keep what is there")
    if max_shard_bytes < 1:
        raise UsageError(f"a shard must have at least one byte, got {max_shard_bytes}")
    path, folder = Path(source), Path(destination)
    if path.resolve() == folder.resolve():
        raise UsageError(f"source and destination are both {path}; give another folder for the converted checkpoint")
    opened = Checkpoint(path, entry)
    weights: WeightSource = opened
    keep = set(opened.files)
    if kind == "auto":
        kind = detect(opened, str(path))
    check_kind(opened, kind, str(path))
    if merge:
        weights = Merged(opened, existing(folder / "transformer"))
        kind = detect(weights, str(path))
    plan = KINDS[kind].plan(weights, kind)
    report = account(plan, weights, str(path), str(folder), dtype)
    check_destination(folder, plan, report, overwrite or merge, keep)
    if strict and report.problems():
        _fail(report, folder)
    writer = Writer(folder, None if dtype is None else DTYPES[dtype], max_shard_bytes, progress)
    with staged(folder, [component.name for component in plan.components]) as places:
        for component in plan.components:
            writer.component(component, weights, report, places[component.name])
        if strict and report.broken:
            _fail(report, folder)
        report.written = True
        for place in places.values():
            report.save(place / ACCOUNT)
    complete = {
        component.name: component.class_name
        for component in plan.components
        if not any(row["component"] == component.name for row in (*report.missing, *report.mismatched, *report.absent))
    }
    write_index(folder, complete, plan.clip)
    if found := leftovers(folder):
        report.notes.append(f"{folder} has what an interrupted run left; remove it: {', '.join(found)}")
    for component in plan.components:
        if component.name not in complete:
            report.notes.append(f"{component.name} is not complete and not in model_index.json yet")
    return report


def _fail(report: Report, folder: Path) -> None:
    """Say the first problems and where the rest is."""
    problems = report.problems()
    account_file = folder.parent / f"{folder.name or 'checkpoint'}.{ACCOUNT}"
    try:
        account_file.parent.mkdir(parents=True, exist_ok=True)
        report.save(account_file)
        rest = f"all of it is in {account_file}"
    except OSError as error:
        rest = f"the whole account could not be written to {account_file} ({one_line(str(error), 80)})"
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    raise FailedError(
        f"{report.source} ({report.kind}) does not fit, nothing was converted: {'; '.join(problems[:4])}{more}; {rest}"
        "; --no-strict converts what fits"
    )


__all__ = ["KINDS", "Checkpoint", "Report", "convert"]
