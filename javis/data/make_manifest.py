"""``javis data make``: a folder tree of clips becomes a manifest.

A clip is a video file, with its sound in it or in a file of the same name with another suffix. Captions come from a CSV
file, from ``NAME.txt`` or from ``NAME.json``.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from javis.console import output, progress_bar
from javis.data.manifest import COLUMNS, SIDE_COLUMN, ClipRow, Manifest
from javis.data.probe import ClipFacts, ClipFiles, measure
from javis.data.workers import Failure, default_processes, isolated_map
from javis.errors import FailedError, UsageError

VIDEO = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv")
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac")  # the first that is there is taken
TEXT_KEYS = ("text", "caption", "prompt")
NAME_KEYS = ("relpath", "path", "video", "file", "id", "name")


class Skipped(NamedTuple):
    """A file that is no clip."""

    path: str
    reason: str


class Made(NamedTuple):
    """What `scan` found. ``without_caption`` and ``without_sound`` count clips that are in the manifest."""

    manifest: Manifest
    skipped: tuple[Skipped, ...]
    without_caption: int
    without_sound: int


def scan(
    folder: Path,
    *,
    captions: Path | None = None,
    processes: int | None = None,
    timeout: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> Made:
    """The clips below a folder, sorted by path. Hidden files and folders are left out.

    Args:
        folder: searched with all its folders; links to folders are not followed.
        captions: CSV file with a column for the caption (`TEXT_KEYS`) and one for the clip (`NAME_KEYS`: its path below
            the folder, its file name, or either without suffix). Its other columns become extra columns.
        processes: that read headers. timeout: seconds for one file.
        progress: called with (clips done, clips in all).

    Raises:
        UsageError: no such folder, no video in it, or an unusable CSV file.
    """
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}; expected a folder with videos")
    folder = folder.absolute()
    told = {} if captions is None else _read_captions(captions)
    videos, skipped = _find_videos(folder)
    if not videos:
        raise UsageError(f"{folder} holds no video; expected files such as {', '.join(VIDEO[:6])}")
    files = [_sound_beside(path) for path in videos]
    facts: list[ClipFacts | Failure] = [Failure("")] * len(videos)
    answers = isolated_map(
        measure, files, processes=min(processes or default_processes(), len(videos)), timeout=timeout
    )
    for done, (index, answer) in enumerate(answers, 1):
        facts[index] = answer
        if progress is not None:
            progress(done, len(videos))
    rows: list[ClipRow] = []
    identities: set[str] = set()
    for path, own, found in zip(videos, files, facts, strict=True):
        if isinstance(found, Failure) or found.picture is None:
            reason = found.reason if isinstance(found, Failure) else "; ".join(what for _, what in found.faults)
            skipped.append(Skipped(str(path), reason))
            continue
        if found.sound is None and own.audio_path != own.path:
            skipped.append(Skipped(own.audio_path, "; ".join(what for _, what in found.faults) or "no sound in it"))
        rows.append(_row(path, folder, own, found, told, identities))
    without_caption = sum(not row.text for row in rows)
    return Made(Manifest(tuple(rows)), tuple(skipped), without_caption, sum(not row.audio_path for row in rows))


def _find_videos(folder: Path) -> tuple[list[Path], list[Skipped]]:
    videos: list[Path] = []
    skipped: list[Skipped] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            if name.startswith(".") or path.suffix.lower() not in VIDEO:
                continue
            try:
                str(path).encode()
            except UnicodeEncodeError:
                skipped.append(Skipped(os.fsencode(path).decode(errors="replace"), "its name is not UTF-8; rename it"))
                continue
            videos.append(path)
    return sorted(videos), skipped


def _sound_beside(video: Path) -> ClipFiles:
    for suffix in AUDIO:
        for written in (suffix, suffix.upper()):
            beside = video.with_suffix(written)
            if beside.is_file():
                return ClipFiles(str(video), str(beside), decode=False)
    return ClipFiles(str(video), str(video), decode=False)


def _row(
    path: Path, folder: Path, files: ClipFiles, facts: ClipFacts, told: Mapping[str, _Told], identities: set[str]
) -> ClipRow:
    picture, sound = facts.picture, facts.sound
    assert picture is not None
    relpath = path.relative_to(folder)
    identity = relpath.with_suffix("").as_posix()
    if identity in identities:  # a.mp4 beside a.webm
        identity = relpath.as_posix()
    identities.add(identity)
    side = path.with_suffix(".json")
    extra = {SIDE_COLUMN: side.name} if side.is_file() else {}
    keys = (relpath.as_posix(), identity, relpath.name, relpath.stem)
    listed = next((told[key] for key in keys if key in told), None)
    text = listed.text if listed is not None else ""
    if listed is not None:
        extra |= listed.extra
    return ClipRow(
        path=str(path),
        id=identity,
        relpath=relpath.as_posix(),
        num_frames=picture.frames,
        height=picture.height,
        width=picture.width,
        aspect_ratio=picture.height / picture.width,
        fps=picture.fps,
        resolution=picture.height * picture.width,
        audio_path=files.audio_path if sound is not None else "",
        audio_fps=sound.sample_rate if sound is not None else 0,
        text=text or _caption_beside(path),
        extra=extra,
    )


# -- captions ---------------------------------------------------------------------------------------------------------


class _Told(NamedTuple):
    text: str
    extra: dict[str, str]


def _clean(text: str) -> str:
    return " ".join(text.replace("\0", " ").split())


def _caption_beside(video: Path) -> str:
    """The caption in ``NAME.txt`` or ``NAME.json``; empty: there is none that can be read."""
    try:
        return _clean(video.with_suffix(".txt").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        pass
    try:
        found: Any = json.loads(video.with_suffix(".json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return ""
    for key in TEXT_KEYS:
        value = found.get(key) if isinstance(found, dict) else None
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return _clean(value)
    return ""


def _read_captions(path: Path) -> dict[str, _Told]:
    """Clip, by each of its names -> caption and further columns. Names that two rows share mean neither."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = [{k: v or "" for k, v in row.items() if isinstance(k, str)} for row in reader]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; expected a CSV file with captions") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not CSV in UTF-8: {error}; expected a header and a row for each clip") from None
    texts = [name for name in TEXT_KEYS if name in header]
    names = [name for name in NAME_KEYS if name in header]
    if not texts or not names:
        raise UsageError(
            f"{path} has the columns {', '.join(header)[:200]}; expected one of {', '.join(TEXT_KEYS)} and one of "
            f"{', '.join(NAME_KEYS)}"
        )
    told: dict[str, _Told] = {}
    doubtful: set[str] = set()
    for row in rows:
        extra = {k: _clean(v) for k, v in row.items() if k not in (*COLUMNS, *TEXT_KEYS, *NAME_KEYS)}
        own = _Told(_clean(row[texts[0]]), extra)
        keys: set[str] = set()
        for name in names:
            cell = row[name].strip().replace(os.sep, "/")
            if cell:
                keys |= {cell, cell.removeprefix("./"), Path(cell).name, Path(cell).stem}
        for key in keys:
            if key in told and told[key] != own:
                doubtful.add(key)
            told[key] = own
    return {key: own for key, own in told.items() if key not in doubtful}


# -- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MakeArgs:
    """Scan a folder tree of clips and write the manifest: a CSV file with the official columns."""

    directory: tyro.conf.Positional[Path]
    """Folder with videos, with sound in them or in a file of the same name (.wav, .flac, ...) beside them."""
    out: Path | None = None
    """The manifest; clips.csv in the folder by default."""
    captions: Path | None = None
    """CSV file with captions. Without it, and for clips it does not name: NAME.txt, or "caption" in NAME.json."""
    overwrite: bool = False
    """Replace a manifest that is there already."""
    processes: int | None = None
    """Processes that read the files; one per core by default."""
    timeout: float = 60.0
    """Seconds for one file."""
    json: bool = False
    """Print what was found as JSON."""


def main(args: MakeArgs) -> None:
    """Run the command."""
    target = args.out or args.directory / "clips.csv"
    if target.exists() and not args.overwrite:
        raise UsageError(f"{target} is there already; --overwrite replaces it, --out gives another name")
    with progress_bar("reading clips", 1) as advance:
        made = scan(
            args.directory,
            captions=args.captions,
            processes=args.processes,
            timeout=args.timeout,
            progress=lambda done, total: advance(done / total),
        )
    if not made.manifest.rows:
        raise FailedError(f"none of {len(made.skipped)} videos can be read; the first: {made.skipped[0].reason}")
    made.manifest.write(target)
    if args.json:
        facts = {
            "manifest": str(target),
            "clips": len(made.manifest),
            "without_caption": made.without_caption,
            "without_sound": made.without_sound,
            "skipped": [{"path": path, "reason": reason} for path, reason in made.skipped],
        }
        output().print(json.dumps(facts, indent=1))
        return
    output().print(
        f"{target}: {len(made.manifest)} clips, {made.without_caption} without a caption, {made.without_sound} without "
        f"sound, {len(made.skipped)} files skipped"
    )
    for path, reason in made.skipped[:10]:
        output().print(f"  skipped {path}: {reason}")
    if len(made.skipped) > 10:
        output().print(f"  and {len(made.skipped) - 10} more (--json lists them)")
