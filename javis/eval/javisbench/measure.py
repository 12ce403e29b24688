"""What is measured of one clip, in the process that decodes it: its facts, its events, its peaks, its embeddings.

A clip that cannot be decoded, has no sound or only one frame is no reason to stop: the facts say so (``faults``), and
parts that need what is missing say why they have nothing (``missing``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from javis.errors import FailedError, UsageError
from javis.eval.javisbench.store import Measured, Store
from javis.eval.metrics.protocol import MetricProtocol

FACTS, SYNC, PEAKS = "facts", "sync", "peaks"  # parts that need no extractor
LEAST_FRAMES = 3  # of anything that has to do with motion
SILENCE = 1e-4  # largest sample, -80 dB of full scale
FLAT = 1.0  # spread of a channel over the pixels of all frames, of 255
LENGTHS_DIFFER = 0.1  # seconds


@dataclass(frozen=True)
class Options:
    """How clips are cut and compared; the same for all of them."""

    seconds: float | None = None  # only the first so many of each clip
    window_seconds: float = 2.0
    window_overlap: float = 1.5
    protocol: MetricProtocol = "corrected"
    weights: str = ""  # folder with the weights of extractors
    device: str = "cpu"  # where they run


@dataclass(frozen=True)
class Task:
    """The parts of one clip that have to be measured, each with its identity in the store."""

    key: str
    video: Path
    audio: Path | None
    text: str | None
    audio_text: str | None
    parts: tuple[tuple[str, str], ...]
    folder: Path
    options: Options


@dataclass(frozen=True)
class ClipData:
    """A decoded clip, picture and sound cut to the same length. ``audio`` is empty where there is none."""

    video: np.ndarray  # uint8 [T, H, W, 3]
    audio: np.ndarray  # float32 [N]
    fps: float
    sample_rate: int


def measure(task: Task) -> str:
    """Measure and store the parts of one clip; returns its key."""
    import torch

    torch.set_num_threads(1)  # processes share the cores
    store = Store(task.folder)
    facts, clip = _decode(task)
    for part, identity in task.parts:
        if part == FACTS:
            found = Measured(facts)
        elif clip is None:
            found = Measured({"missing": facts["faults"]["unreadable"]})
        else:
            found = _part(part, clip, task)
        store.put(part, task.key, identity, found)
    return task.key


def _part(part: str, clip: ClipData, task: Task) -> Measured:
    from javis.eval.javisbench.embed import embed

    wanting = _wanting(part, clip)
    if wanting is not None:
        return Measured({"missing": wanting})
    try:
        if part == SYNC:
            return Measured(sync_facts(clip, task.text))
        if part == PEAKS:
            return Measured(peak_facts(clip))
        return Measured({}, embed(part, clip, task))
    except (UsageError, FailedError, ValueError) as error:  # of this clip; the others may do better
        return Measured({"missing": f"{part}: {error}"})


def _wanting(part: str, clip: ClipData) -> str | None:
    """What this clip lacks for a part that cannot do without."""
    if part not in (SYNC, PEAKS):
        return None
    if not len(clip.audio):
        return "no sound"
    return f"{len(clip.video)} frames, at least {LEAST_FRAMES} are needed" if len(clip.video) < LEAST_FRAMES else None


# --- decoding -----------------------------------------------------------------------------------------------------


def _decode(task: Task) -> tuple[dict[str, Any], ClipData | None]:
    """What the clip is, with ``faults`` (kind -> reason); and the clip, None if it is unreadable."""
    from javis.media import read_clip

    faults: dict[str, str] = {}
    try:
        found = read_clip(task.video)
        audio, rate = found.audio, found.sample_rate
        if task.audio is not None:
            audio, rate = read_wav(task.audio)
        if not 0 < found.fps <= 1000:
            raise UsageError(f"{task.video} states {found.fps:g} frames a second")
    except UsageError as error:
        faults["unreadable"] = str(error)
        return {"faults": faults}, None
    video = found.video
    facts: dict[str, Any] = {
        "frames": len(video),
        "fps": round(found.fps, 6),
        "height": video.shape[1],
        "width": video.shape[2],
        "video_seconds": round(len(video) / found.fps, 6),
        "sample_rate": rate,
        "audio_seconds": round(len(audio) / rate, 6) if rate else 0.0,
        "faults": faults,
    }
    if not np.isfinite(audio).all():
        faults["no sound"], audio = "the samples are not finite", audio[:0]
    elif not len(audio):
        faults["no sound"] = "neither a sound stream nor a wav of the same name"
    elif float(np.abs(audio).max()) < SILENCE:
        faults["silent"] = f"no sample above {SILENCE:g}"
    if len(video) < LEAST_FRAMES:
        faults["too few frames"] = f"{len(video)}"
    if float(video[:: max(1, len(video) // 16)].reshape(-1, 3).std(axis=0).max()) < FLAT:
        faults["constant colour"] = "all pixels of all frames are alike"
    if len(audio) and abs(facts["video_seconds"] - facts["audio_seconds"]) > LENGTHS_DIFFER:
        faults["lengths differ"] = (
            f"picture {facts['video_seconds']:g} s, sound {facts['audio_seconds']:g} s; the rest is cut off"
        )
    return facts, cut_clip(ClipData(video, audio, found.fps, rate), task.options.seconds)


def cut_clip(clip: ClipData, seconds: float | None) -> ClipData:
    """Picture and sound to the same length, at most ``seconds``; without sound only the picture."""
    longest = len(clip.video) / clip.fps if seconds is None else min(seconds, len(clip.video) / clip.fps)
    if len(clip.audio):
        longest = min(longest, len(clip.audio) / clip.sample_rate)
    frames = max(1, round(longest * clip.fps))
    samples = round(longest * clip.sample_rate)
    return ClipData(clip.video[:frames], clip.audio[:samples], clip.fps, clip.sample_rate)


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """Samples float32 [N], channels averaged, and their rate. Raises `UsageError` for what is no sound file."""
    import soundfile

    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UsageError(f"cannot read {path}: {error}; expected a wav file") from None
    return audio.mean(axis=1), int(rate)


# --- parts without extractor --------------------------------------------------------------------------------------


def sync_facts(clip: ClipData, text: str | None) -> dict[str, Any]:
    """The sync report of a clip, and ``sources``: times (s) seen and heard of each source that should be both.

    A text in the words of the built-in world says what to look and listen for, and ``checks`` what of it the clip has
    (`check_attributes`: lists of bools by attribute). Any other text, and none, gives one source: all events.
    """
    from javis.eval.attributes import check_attributes
    from javis.eval.sync import sync_report
    from javis.world import parse_prompt

    try:
        clauses: Sequence[Mapping[str, Any]] | None = None if text is None else parse_prompt(text)
    except UsageError:
        clauses = None
    report = sync_report(clip.video, clip.audio, clip.fps, clip.sample_rate, clauses)
    groups: list[int | None] = [None]
    checks: dict[str, list[bool]] = {}
    if clauses is not None:
        groups = [i for i, c in enumerate(clauses) if c.get("visible", True) and c.get("audible", True)]
        for result in check_attributes(clip.video, clip.audio, clip.fps, clip.sample_rate, clauses):
            for name, right in result.items():
                checks.setdefault(name, []).append(bool(right))

    def times(events: Sequence[Mapping[str, Any]], group: int | None) -> list[float]:
        return [float(event["time_s"]) for event in events if group is None or event["source"] == group]

    sources = [[times(report["video_events"], group), times(report["audio_events"], group)] for group in groups]
    return {**report, "by_source": clauses is not None, "sources": sources, "checks": checks}


def peak_facts(clip: ClipData) -> dict[str, Any]:
    """Peaks of motion and sound (s) as AV-Align takes them, and what `javis eval sync` says without a prompt."""
    from javis.eval.sync_measures import Measures

    measures = Measures.of(clip.video, clip.audio, clip.fps, clip.sample_rate)
    peaks = {"video": measures.flow_peaks, "audio": measures.onset_peaks, "fps": clip.fps}
    return {**measures.report(), **peaks}
