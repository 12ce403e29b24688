"""``javis eval sync``: how well picture and sound agree in each clip of a folder, and over all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from javis.console import output, progress_bar
from javis.errors import FailedError, UsageError
from javis.eval.sync import sync_report
from javis.eval.sync_measures import Measures, remarks
from javis.eval.sync_summary import summary
from javis.eval.sync_truth import against_truth, true_events
from javis.media import check_writable, read_clip, write_text
from javis.world import parse_prompt


@dataclass(frozen=True, kw_only=True)
class SyncArgs:
    """Detect events in picture and sound of every mp4 in a folder, and say how well they agree.

    A json of the same name may hold the prompt ("caption" or "prompt"); events are then matched source by source. If it
    is the truth that `javis world make` writes, detections are compared with it. A wav of the same name is the sound of
    an mp4 that has none. Clips that cannot be measured are named and counted, the rest is evaluated.
    """

    directory: tyro.conf.Positional[Path]
    """Folder with clips, such as `javis sample --prompts` or `javis world make` writes."""
    json: Path | None = None
    """Write the report of every clip and the summary to this file."""
    prompts: bool = True
    """Match source by source as the prompts say; without, everything seen with everything heard."""


def sync_folder(directory: Path, *, use_prompts: bool = True, show_progress: bool = False) -> dict[str, Any]:
    """Measure all ``*.mp4`` in ``directory``, json values.

    Returns:
        ``clips``: {name: `javis.eval.sync.sync_report` and ``sync_score``, ``offset``, ``av_align``, ``remarks``, and
        ``truth`` where a side file has it}; ``skipped``: {name: why}; ``summary``: `javis.eval.sync_summary.summary`.

    Raises:
        UsageError: no such folder, or no mp4 in it.
        FailedError: none of its clips can be measured.
    """
    if not directory.is_dir():
        raise UsageError(f"no such folder: {directory}; expected a folder with mp4 files")
    paths = sorted(path for path in directory.glob("*.mp4") if not path.name.startswith("."))
    if not paths:
        raise UsageError(f"{directory} holds no mp4; expected a folder that 'javis sample --prompts' has written")
    clips: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    measured: list[Measures] = []
    with progress_bar("detecting events", len(paths) if show_progress else 1) as advance:
        for number, path in enumerate(paths, 1):
            try:
                clips[path.name], measures = _measure(path, use_prompts)
                measured.append(measures)
            except (UsageError, ValueError) as error:
                skipped[path.name] = str(error)
            if show_progress:
                advance(number)
    if not clips:
        name, reason = next(iter(skipped.items()))
        raise FailedError(f"none of the {len(paths)} clips in {directory} can be measured; {name}: {reason}")
    return {"summary": summary(list(clips.values()), measured, len(skipped)), "skipped": skipped, "clips": clips}


def _measure(path: Path, use_prompts: bool) -> tuple[dict[str, Any], Measures]:
    """The report of one clip. Raises `UsageError` or ValueError if there is none."""
    clip = read_clip(path)
    audio, sample_rate = clip.audio, clip.sample_rate
    if not len(audio):
        audio, sample_rate = _wav(path.with_suffix(".wav"))
    odd = remarks(clip.video, audio, clip.fps, sample_rate)
    try:
        facts = _side_file(path.with_suffix(".json"))
    except ValueError:
        facts = None
        odd.append("unreadable json")
    prompt = _prompt(facts) if use_prompts else None
    measures = Measures.of(clip.video, audio, clip.fps, sample_rate)
    report = {
        "prompt": prompt,
        **sync_report(clip.video, audio, clip.fps, sample_rate, prompt),
        **measures.report(),
        "fps": clip.fps,
        "size": list(clip.video.shape[1:3]),
        "remarks": odd,
    }
    truth = true_events(facts)
    if truth is not None:
        report["truth"] = against_truth(truth, report)
    return report, measures


def _wav(path: Path) -> tuple[np.ndarray, int]:
    import soundfile

    if not path.is_file():
        raise UsageError(f"no sound, and there is no {path.name} beside it")
    try:
        audio, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UsageError(f"cannot read {path}: {error}; expected a wav file") from None
    if not len(audio):
        raise UsageError(f"{path.name} holds no samples")
    return audio.mean(axis=1), int(sample_rate)


def _side_file(path: Path) -> Any:
    """The json of a clip, None if there is none. Raises ValueError if it cannot be read."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _prompt(facts: Any) -> str | None:
    """The prompt in a clip's json if it has one in the words of the world, else None."""
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
    for line in _lines(report["summary"]):
        output().print(line)
    for name, reason in report["skipped"].items():
        output(stderr=True).print(f"skipped {name}: {reason}")


def _lines(figures: dict[str, Any], name: str = "") -> list[str]:
    """Nested figures as lines of "a.b   figure"; an interval is one figure."""
    lines = []
    for key, value in figures.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{name}{key}.")
        else:
            lines.append(f"{name + key:34s}{'-' if value is None else value}")
    return lines
