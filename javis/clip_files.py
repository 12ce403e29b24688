"""The files of a clip, ``F.mp4``, ``F.png`` and ``F.json``, written together; and the list of skipped rows."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import javis
from javis.errors import FailedError
from javis.media import atomic_file, check_writable, remove_leftovers, write_clip, write_text
from javis.requests import Fault, list_faults

if TYPE_CHECKING:
    from javis.decode.stream import StreamedClips
    from javis.pipeline import ClipBatch

SUFFIXES = (".mp4", ".png", ".json")


def prepare(outs: Sequence[Path]) -> None:
    """Raise `UsageError` unless these clips can be written; clear away what a killed run has left beside them."""
    for folder, out in {out.parent: out for out in outs}.items():
        for suffix in SUFFIXES:
            check_writable(out.with_suffix(suffix))
        remove_leftovers(folder)


def checkpoint_fingerprint(checkpoint: str) -> str | None:
    """Digest of config.json, and of size, first and last MiB of the weights; None if there are none to read."""
    folder = Path(javis.__file__).parent / "weights" / "demo" if checkpoint == "demo" else Path(checkpoint)
    digest = hashlib.sha256()
    try:
        digest.update((folder / "config.json").read_bytes())
        with (folder / "model.safetensors").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for start in (0, max(0, size - (1 << 20))):
                file.seek(start)
                digest.update(file.read(1 << 20))
    except OSError:
        return None  # loading it will say what is missing
    return digest.hexdigest()[:16]


def is_finished(out: Path, wanted: Mapping[str, Any]) -> bool:
    if not (out.is_file() and out.with_suffix(".png").is_file() and out.with_suffix(".json").is_file()):
        return False
    try:
        found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    except ValueError:
        return False  # not what was written here; it is made again
    return isinstance(found, dict) and found.get("request") == wanted


def save(
    batch: ClipBatch,
    index: int,
    out: Path,
    request: Mapping[str, Any],
    *,
    scale_to: tuple[int, int] | None,
    load_seconds: float,
    world: bool,
    streamed: StreamedClips | None = None,
) -> str:
    """Write mp4, contact sheet and json of clip ``index``; return a line that says what was written.

    The three appear together at the end, json last; an older json is removed first, so that none ever describes another
    clip. ``streamed`` may have written the mp4 already.
    """
    from javis.contact_sheet import contact_sheet
    from javis.eval.sync import sync_report

    video, audio = batch.video[index], batch.audio[index]
    started = time.perf_counter()
    report = sync_report(video, audio, batch.fps, batch.sample_rate, batch.prompts[index] if world else None)
    sync_seconds = time.perf_counter() - started
    out.with_suffix(".json").unlink(missing_ok=True)
    with (
        atomic_file(out.with_suffix(".json")) as json_file,
        atomic_file(out.with_suffix(".png")) as png_file,
        atomic_file(out) as mp4_file,
    ):
        started = time.perf_counter()
        if streamed is None or not streamed.put(out, mp4_file):
            write_clip(mp4_file, video, audio, batch.fps, batch.sample_rate, scale_to=scale_to)
        mp4_seconds = time.perf_counter() - started
        started = time.perf_counter()
        contact_sheet(
            png_file,
            video,
            audio,
            batch.fps,
            batch.sample_rate,
            title=f"{batch.prompts[index]}   (seed {batch.seeds[index]}, {batch.steps} steps)",
            video_events=[event["time_s"] for event in report["video_events"]],
            audio_events=[event["time_s"] for event in report["audio_events"]],
        )
        stages = {
            "load": load_seconds,
            **batch.seconds_per_stage,
            "sync_report": sync_seconds,
            "mp4": mp4_seconds,
            "contact_sheet": time.perf_counter() - started,
        }
        facts = {
            "prompt": request["prompt"],
            "caption": batch.prompts[index],
            "seed": batch.seeds[index],
            "steps": batch.steps,
            "guidance": batch.guidance,
            "audio_guidance": batch.audio_guidance,
            "order": batch.order,
            "variant": batch.choice.variant,
            "forwards": batch.forwards,  # of the model; a guided evaluation is two
            **batch.options,
            "seconds": len(video) / batch.fps,
            "frames": len(video),
            "fps": batch.fps,
            "samples": len(audio),
            "sample_rate": batch.sample_rate,
            "model_resolution": f"{video.shape[2]}x{video.shape[1]}",
            "batch": len(batch),  # clips that the stages before the sync report made together
            "seconds_per_stage": {name: round(value, 4) for name, value in stages.items()},
            "sync": report,
            "request": dict(request),
            "javis": javis.__version__,
        }
        if batch.audio_seeds is not None:
            facts["audio_seed"] = batch.audio_seeds[index]
        if batch.caches is not None:
            facts["cache"] = batch.caches[index]
        if batch.random_weights:
            facts["random_weights"] = True
        if batch.choice.because is not None:
            facts["variant_because"] = batch.choice.because
        if batch.candidates is not None:
            facts["best_of"] = [{"seed": seed, "score": score} for seed, score in batch.candidates[index]]
        json_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    offset = report["mean_abs_offset_ms"]
    heard = f"{len(report['matched'])} of {len(report['video_events'])} seen events heard"
    noise = "random weights, " if batch.random_weights else ""
    apart = f", {offset:g} ms apart" if offset is not None else ""
    best = ""
    if batch.candidates is not None:
        best = f", best of {len(batch.candidates[index])}: score {max(c.score for c in batch.candidates[index]):g}"
    return f"{out}  {len(video) / batch.fps:g} s, {noise}{heard}{apart}{best}"


class SkippedRows:
    """Rows of a CSV file that make no clip: a line for people, and ``_skipped.json`` beside the clips.

    Args:
        csv: the file with the rows.
        folder: where the clips go.
        index, count: share of the rows; each share has a list of its own, ``_skipped-1.json`` and so on.
    """

    def __init__(self, csv: Path, folder: Path, index: int = 0, count: int = 1) -> None:
        self.csv, self.folder, self.index, self.count = csv, folder, index, count
        self.faults: list[Fault] = []

    @property
    def path(self) -> Path:
        return self.folder / (f"_skipped-{self.index}.json" if self.index else "_skipped.json")

    def write(self) -> None:
        """Write the list, or remove that of an earlier run if nothing is skipped any more."""
        if self.index == 0:  # lists of shares there are no more
            for path in self.folder.glob("_skipped-*.json"):
                number = path.stem.removeprefix("_skipped-")
                if number.isdecimal() and int(number) >= self.count:
                    path.unlink(missing_ok=True)
        if self.faults:
            rows = [{"line": fault.line, "error": fault.message} for fault in sorted(self.faults)]
            write_text(self.path, json.dumps({"csv": str(self.csv), "rows": rows}, indent=1) + "\n")
        else:
            self.path.unlink(missing_ok=True)

    def __str__(self) -> str:
        return f"{self.csv}: skipped {list_faults(sorted(self.faults))}"

    def complain(self) -> None:
        """Raise `FailedError` if there are any."""
        if self.faults:
            raise FailedError(f"{self}; see {self.path}; the other clips are there")
