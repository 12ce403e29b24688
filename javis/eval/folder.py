"""``javis eval sync``: how well picture and sound agree in each clip of a folder, and over all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from javis.console import output, progress_bar
from javis.errors import UsageError
from javis.eval.sync import PRIMARY, sync_report
from javis.media import check_writable, read_clip, write_text
from javis.world import parse_prompt

_PRIMARY = f"{1000 * PRIMARY:g}"


@dataclass(frozen=True, kw_only=True)
class SyncArgs:
    """Detect events in picture and sound of every mp4 in a folder, and say how well they agree.

    A json of the same name may hold the prompt ("caption" or "prompt"); events are then matched source by source. A wav
    of the same name is the sound of an mp4 that has none.
    """

    directory: tyro.conf.Positional[Path]
    """Folder with clips, such as `javis sample --prompts` or `javis world make` writes."""
    json: Path | None = None
    """Write the report of every clip and the summary to this file."""
    prompts: bool = True
    """Match source by source as the prompts say; without, everything seen with everything heard."""


def sync_folder(directory: Path, *, use_prompts: bool = True, show_progress: bool = False) -> dict[str, Any]:
    """Sync reports of all ``*.mp4`` in ``directory`` -> ``{"summary": ..., "clips": {name: report}}``, json values.

    The summary pools the matched pairs and events of all clips (``f1`` at one frame of 16 fps, offsets in ms).

    Raises:
        UsageError: no such folder, no mp4 in it, or a clip that cannot be read.
    """
    if not directory.is_dir():
        raise UsageError(f"no such folder: {directory}; expected a folder with mp4 files")
    paths = sorted(path for path in directory.glob("*.mp4") if not path.name.startswith("."))
    if not paths:
        raise UsageError(f"{directory} holds no mp4; expected a folder that 'javis sample --prompts' has written")
    clips: dict[str, Any] = {}
    with progress_bar("detecting events", len(paths) if show_progress else 1) as advance:
        for number, path in enumerate(paths, 1):
            clip = read_clip(path)
            audio, sample_rate = clip.audio, clip.sample_rate
            if not len(audio):
                audio, sample_rate = _wav(path.with_suffix(".wav"))
            prompt = _prompt(path.with_suffix(".json")) if use_prompts else None
            report = sync_report(clip.video, audio, clip.fps, sample_rate, prompt)
            clips[path.name] = {"prompt": prompt, **report}
            if show_progress:
                advance(number)
    return {"summary": _summary(list(clips.values())), "clips": clips}


def _summary(reports: list[dict[str, Any]]) -> dict[str, Any]:
    offsets = [pair["offset_ms"] for report in reports for pair in report["matched"]]
    scores = [report["f1"][_PRIMARY] for report in reports if report["f1"][_PRIMARY] is not None]
    return {
        "clips": len(reports),
        "clips_with_events": len(scores),
        "video_events": sum(len(report["video_events"]) for report in reports),
        "audio_events": sum(len(report["audio_events"]) for report in reports),
        "matched": len(offsets),
        f"mean_f1_{_PRIMARY}ms": round(float(np.mean(scores)), 4) if scores else None,
        "mean_abs_offset_ms": round(float(np.mean(np.abs(offsets))), 2) if offsets else None,
        "mean_offset_ms": round(float(np.mean(offsets)), 2) if offsets else None,
    }


def _wav(path: Path) -> tuple[np.ndarray, int]:
    import soundfile

    if not path.is_file():
        raise UsageError(f"{path.with_suffix('.mp4')} has no sound, and there is no {path.name} beside it")
    try:
        audio, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UsageError(f"cannot read {path}: {error}; expected a wav file") from None
    return audio.mean(axis=1), int(sample_rate)


def _prompt(path: Path) -> str | None:
    """The prompt in a clip's json if it has one in the words of the world, else None."""
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not json ({error}); remove it or use --no-prompts") from None
    prompt = facts.get("caption") or facts.get("prompt") if isinstance(facts, dict) else None
    if not isinstance(prompt, str):
        return None
    try:
        parse_prompt(prompt)
    except UsageError:
        return None  # clips of another model; everything seen is matched with everything heard
    return prompt


def main(args: SyncArgs) -> None:
    """Entry of ``javis eval sync``."""
    if args.json is not None:
        check_writable(args.json)
    report = sync_folder(args.directory, use_prompts=args.prompts, show_progress=True)
    if args.json is not None:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    for name, value in report["summary"].items():
        output().print(f"{name:22s}{'-' if value is None else value}")
