"""``javis sample``: from arguments or the rows of a CSV file to clips on disk.

Everything that can be checked is checked before anything is generated: first the arguments and all rows (no heavy
import), then the prompts and lengths against the checkpoint. A clip is three files, ``F.mp4``, ``F.png`` and
``F.json``; the json comes last, so a clip is finished when its json is there and holds the same request.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

import javis
from javis.console import output, progress_bar
from javis.errors import UsageError
from javis.media import atomic_file, check_writable, write_clip
from javis.requests import EXAMPLE, ClipRequest, check_request, list_faults, read_requests, slug

if TYPE_CHECKING:
    from javis.pipeline import ClipBatch, JavisPipeline

MAX_GUIDANCE, MAX_SIDE = 100.0, 4096


@dataclass(frozen=True, kw_only=True)
class SampleArgs:
    """Make a clip with sound from a prompt, or one clip for each row of a CSV file.

    One clip: F.mp4, F.png (frames over the spectrogram, events marked) and F.json (what was asked, seconds per stage,
    sync report). A prompt that begins with a dash goes after "--".
    """

    prompt: tyro.conf.Positional[str | None] = None
    """What to show, in quotes: "a red ball bounces on the left"."""
    out: Path | None = None
    """File to write, ending in .mp4 (default: out/<prompt>.mp4). With --prompts: a folder (default: out/<csv name>)."""
    prompts: Path | None = None
    """CSV file with a column "prompt" or "text", optionally id, seed, seconds, steps. Finished clips are skipped."""
    seed: int = 0
    """Same seed, same clip. With --prompts, row i without a seed gets this + i."""
    steps: int | None = None
    """Denoising steps (default: the checkpoint's)."""
    seconds: float | None = None
    """Length of the clip (default: the checkpoint's)."""
    guidance: float | None = None
    """Classifier-free guidance, 1 = none (default: the checkpoint's)."""
    audio_guidance: float | None = None
    """The same of the sound (default: --guidance if given, else the checkpoint's)."""
    resolution: str = "256x256"
    """WIDTHxHEIGHT of the mp4; what the model makes is scaled smoothly to it."""
    checkpoint: str = "demo"
    """Folder with config.json and model.safetensors, or "demo", the built-in model."""
    order: Literal["together", "sound_first"] | None = None
    """Make picture and sound side by side, or the sound first, in as many steps (default: the checkpoint's)."""
    batch_size: int = 4
    """Clips generated together (with --prompts)."""
    ops: Literal["fused", "reference"] = "fused"
    """What the model runs on: the kernels of javis, or plain PyTorch."""


def parse_resolution(text: str) -> tuple[int, int]:
    """``"512x512"`` (WIDTHxHEIGHT) -> (height, width) in pixels, both even and at most 4096."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip(), re.ASCII)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (16 <= width <= MAX_SIDE and 16 <= height <= MAX_SIDE) or width % 2 or height % 2:
        raise UsageError(
            f"resolution {text[:40]!r} is unusable; expected WIDTHxHEIGHT in even numbers from 16 to {MAX_SIDE}, "
            "such as 512x512"
        )
    return height, width


def main(args: SampleArgs) -> int:
    """Entry of ``javis sample``. Raises `UsageError` and `FailedError` with messages of one line."""
    if (args.prompt is None) == (args.prompts is None):
        raise UsageError(f"expected either a prompt {EXAMPLE} or --prompts FILE.csv, and not both")
    scale_to = parse_resolution(args.resolution)
    for name in ("guidance", "audio_guidance"):
        scale = getattr(args, name)
        if scale is not None and not 0 <= scale <= MAX_GUIDANCE:  # refuses NaN, too
            raise UsageError(f"{name} must be between 0 and {MAX_GUIDANCE:g} (1 = none), got {scale}")
    if not 1 <= args.batch_size <= 1024:
        raise UsageError(f"batch size must be a whole number from 1 to 1024, got {args.batch_size}")
    if args.prompt is not None:
        request = ClipRequest(slug(args.prompt), args.prompt, args.seed, args.steps, args.seconds)
        check_request(request)
        out = args.out if args.out is not None else Path("out") / f"{request.stem}.mp4"
        if out.suffix.lower() != ".mp4":
            raise UsageError(f"--out {str(out)!r} must be a file name ending in .mp4")
        jobs = {request: out}
    else:
        assert args.prompts is not None
        requests = read_requests(args.prompts, seed=args.seed, steps=args.steps, seconds=args.seconds)
        folder = args.out if args.out is not None else Path("out") / args.prompts.stem
        if folder.is_file() or folder.suffix.lower() == ".mp4":
            raise UsageError(f"--out {str(folder)!r} must be a folder when --prompts is given")
        jobs = {request: folder / f"{request.stem}.mp4" for request in requests}

    console = output()
    fingerprint = checkpoint_fingerprint(args.checkpoint)
    wanted = {request: _record(request, args, scale_to, fingerprint) for request in jobs}
    if args.prompts is not None:
        todo = [request for request, out in jobs.items() if not _finished(out, wanted[request])]
        console.print(f"{len(jobs)} rows, {len(jobs) - len(todo)} already finished")
    else:
        todo = list(jobs)
    if not todo:
        return 0
    for out in {jobs[request].parent: jobs[request] for request in todo}.values():
        for path in (out, out.with_suffix(".png"), out.with_suffix(".json")):
            check_writable(path)

    started = time.perf_counter()
    pipe = _load(args.checkpoint, args.ops)
    load_seconds = time.perf_counter() - started
    _check_against(pipe, todo, scale_to, args)
    done = 0
    bar_is_drawn = output(stderr=True).is_terminal  # lines between would tear it, so they come after it
    written: list[str] = []
    try:
        with progress_bar("sampling", len(todo)) as advance:
            for group in _groups(todo, args.batch_size):
                batch = pipe(
                    [request.prompt for request in group],
                    seconds=group[0].seconds,
                    steps=group[0].steps,
                    guidance=args.guidance,
                    audio_guidance=args.audio_guidance,
                    order=args.order,
                    seed=[request.seed for request in group],
                    batch_size=len(group),
                    progress=_clips_done(advance, done, len(group)),
                )
                for index, request in enumerate(group):
                    line = save(
                        batch,
                        index,
                        jobs[request],
                        wanted[request],
                        scale_to=scale_to,
                        load_seconds=load_seconds,
                        world=pipe.description.get("world") == "javis",
                    )
                    done += 1
                    written.append(line)
                    if not bar_is_drawn:
                        console.print(written.pop())
    except KeyboardInterrupt:
        if args.prompts is None:
            raise
        left = len(todo) - done
        raise KeyboardInterrupt(f"{left} of {len(jobs)} clips are left; the same command goes on from here") from None
    finally:
        for line in written:
            console.print(line)
    return 0


def _clips_done(advance: Callable[[float], None], before: int, size: int) -> Callable[[int, int], None]:
    """Turn the pipeline's (step, steps) into clips done: ``before``, plus a share of the ``size`` in work."""
    return lambda step, steps: advance(before + size * step / steps)


def _record(
    request: ClipRequest, args: SampleArgs, scale_to: tuple[int, int], fingerprint: str | None
) -> dict[str, Any]:
    """What a finished clip's json must hold so that the clip need not be made again."""
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": request.steps,
        "seconds": request.seconds,
        "guidance": args.guidance,
        "audio_guidance": args.audio_guidance,
        "order": args.order,
        "resolution": f"{scale_to[1]}x{scale_to[0]}",
        "checkpoint": args.checkpoint,
        "checkpoint_fingerprint": fingerprint,
        "ops": args.ops,
    }


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


def _finished(out: Path, wanted: Mapping[str, Any]) -> bool:
    if not (out.is_file() and out.with_suffix(".png").is_file() and out.with_suffix(".json").is_file()):
        return False
    try:
        found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    except ValueError:
        return False  # not what was written here; it is made again
    return isinstance(found, dict) and found.get("request") == wanted


def _load(checkpoint: str, ops: str) -> JavisPipeline:
    from javis.model.ops import ModelOps
    from javis.pipeline import JavisPipeline

    return JavisPipeline.from_pretrained(checkpoint, ops=ModelOps.fused() if ops == "fused" else ModelOps())


def _check_against(
    pipe: JavisPipeline, requests: Sequence[ClipRequest], scale_to: tuple[int, int], args: SampleArgs
) -> None:
    """Refuse what this checkpoint cannot make, before anything is generated."""
    if scale_to[0] != scale_to[1]:
        raise UsageError(
            f"checkpoint {args.checkpoint!r} makes square pictures, so --resolution {args.resolution} would distort "
            f"them; expected something like {scale_to[0]}x{scale_to[0]}"
        )
    faults: list[tuple[int, str]] = []
    for request in requests:
        try:
            pipe.captions([request.prompt])
            if request.seconds is not None:
                pipe.frames_of(request.seconds)
        except UsageError as error:
            if request.line is None:
                raise
            faults.append((request.line, str(error)))
    if faults:
        assert args.prompts is not None
        raise UsageError(list_faults(args.prompts, faults))


def _groups(requests: Sequence[ClipRequest], batch_size: int) -> Iterator[list[ClipRequest]]:
    """Requests that can be denoised together, in the order of their first member."""
    alike: dict[tuple[int | None, float | None], list[ClipRequest]] = {}
    for request in requests:
        alike.setdefault((request.steps, request.seconds), []).append(request)
    for members in alike.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def save(
    batch: ClipBatch,
    index: int,
    out: Path,
    request: Mapping[str, Any],
    *,
    scale_to: tuple[int, int],
    load_seconds: float,
    world: bool,
) -> str:
    """Write mp4, contact sheet and json of clip ``index``; return a line that says what was written.

    The three appear together at the end, json last; an older json is removed first, so that none ever describes another
    clip.
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
            "seconds": len(video) / batch.fps,
            "frames": len(video),
            "fps": batch.fps,
            "samples": len(audio),
            "sample_rate": batch.sample_rate,
            "model_resolution": f"{video.shape[2]}x{video.shape[1]}",
            "batch": len(batch),  # clips that the stages text, denoise and decode made together
            "seconds_per_stage": {name: round(value, 4) for name, value in stages.items()},
            "sync": report,
            "request": dict(request),
            "javis": javis.__version__,
        }
        json_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    offset = report["mean_abs_offset_ms"]
    heard = f"{len(report['matched'])} of {len(report['video_events'])} seen events heard"
    return f"{out}  {len(video) / batch.fps:g} s, {heard}" + (f", {offset:g} ms apart" if offset is not None else "")


__all__ = ["ClipRequest", "SampleArgs", "checkpoint_fingerprint", "main", "parse_resolution", "save"]
