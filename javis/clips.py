"""``javis sample``: from arguments or the rows of a CSV file to clips on disk.

Everything that can be checked is checked before anything is generated: first the arguments and all rows (no heavy
import), then the prompts and lengths against the checkpoint. Unusable rows are skipped and reported. A clip is three
files, ``F.mp4``, ``F.png`` and ``F.json``; the json comes last, so a clip is finished when its json is there and holds
the same request.

Started by ``torchrun``, every process (or every group of processes that make a clip together) makes its share of the
rows, which is fixed by the order of the rows: no two make the same clip, and none waits for another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from javis.clip_files import SkippedRows, is_finished, prepare, save
from javis.console import output, progress_bar
from javis.errors import FailedError, UsageError
from javis.parallel.ranks import Share, rank_from_env
from javis.requests import EXAMPLE, MAX_BEST_OF, ClipRequest, Fault, check_request, list_faults, read_requests, slug
from javis.sample_options import (
    PipelineArgs,
    call_options,
    check_format,
    identity,
    is_full_size,
    load_pipeline,
    scale_to,
)
from javis.sampler_options import check_ranges

if TYPE_CHECKING:
    from javis.pipeline import ClipBatch, JavisPipeline

MAX_GUIDANCE = 100.0


@dataclass(frozen=True, kw_only=True)
class SampleArgs(PipelineArgs):
    """Make a clip with sound from a prompt, or one clip for each row of a CSV file.

    One clip: F.mp4, F.png (frames over the spectrogram, events marked) and F.json (what was asked, seconds per stage,
    sync report). A prompt that begins with a dash goes after "--".
    """

    prompt: tyro.conf.Positional[str | None] = None
    """What to show, in quotes: "a red ball bounces on the left"."""
    out: Path | None = None
    """File to write, ending in .mp4 (default: out/<prompt>.mp4). With --prompts: a folder (default: out/<csv name>)."""
    prompts: Path | None = None
    """CSV file: column "prompt" or "text", optionally id, seed, audio_seed, seconds, steps. Finished clips stay."""
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
    order: Literal["together", "sound_first"] | None = None
    """Make picture and sound side by side, or the sound first, in as many steps (default: the checkpoint's)."""
    variant: Literal["teacher", "student"] | None = None
    """Which model of the checkpoint (default: its student, if it has one that can do what is asked; the teacher with
    --guidance or more than 8 --steps)."""
    best_of: int = 1
    """Make so many clips of each prompt and keep the one whose picture and sound agree best."""
    batch_size: int = 4
    """Clips generated together (with --prompts or --best-of)."""
    cfg_parallel: Literal[1, 2] = 1
    """With torchrun: processes for the two halves of guidance of each clip."""
    seq_parallel: int = 1
    """With torchrun: processes that share the tokens of each clip. Groups of both share the rows of --prompts."""


def main(args: SampleArgs) -> int:
    """Entry of ``javis sample``. Raises `UsageError` and `FailedError` with messages of one line."""
    if (args.prompt is None) == (args.prompts is None):
        raise UsageError(f"expected either a prompt {EXAMPLE} or --prompts FILE.csv, and not both")
    full = is_full_size(args)
    check_format(args, full)
    for name in ("guidance", "audio_guidance"):
        scale = getattr(args, name)
        if scale is not None and not 0 <= scale <= MAX_GUIDANCE:  # refuses NaN, too
            raise UsageError(f"{name} must be between 0 and {MAX_GUIDANCE:g} (1 = none), got {scale}")
    check_ranges(args.sampler.given())
    if not 1 <= args.best_of <= MAX_BEST_OF:
        raise UsageError(f"best-of must be a whole number from 1 to {MAX_BEST_OF}, got {args.best_of}")
    if args.sampler.cache not in (None, "none") and (args.cuda_graphs or args.cfg_parallel * args.seq_parallel > 1):
        raise UsageError(
            "a cache decides in every step, by the values of all tokens, what is computed: expected --cache without "
            "--cuda-graphs, --cfg-parallel and --seq-parallel"
        )
    if not 1 <= args.batch_size <= 1024:
        raise UsageError(f"batch size must be a whole number from 1 to 1024, got {args.batch_size}")
    share = Share(rank_from_env(), args.cfg_parallel, args.seq_parallel)
    if args.cuda_graphs and share.together > 1:
        raise UsageError(
            "--cuda-graphs cannot be used with --cfg-parallel or --seq-parallel, whose processes exchange data in each "
            "step; leave one of them out"
        )
    skipped = None
    if args.prompt is not None:
        jobs = _single(args, share)
    else:
        assert args.prompts is not None
        requests, faults = read_requests(
            args.prompts, seed=args.seed, steps=args.steps, seconds=args.seconds, audio_seed=args.sampler.audio_seed
        )
        folder = args.out if args.out is not None else Path("out") / args.prompts.stem
        if folder.is_file() or folder.suffix.lower() == ".mp4":
            raise UsageError(f"--out {str(folder)!r} must be a folder when --prompts is given")
        jobs = {request: folder / f"{request.stem}.mp4" for request in share.of(requests)}
        skipped = SkippedRows(args.prompts, folder, share.index, share.count)
        skipped.faults += faults if share.index == 0 else []
    with share:
        _run(args, jobs, skipped, share, full)
    share.leave(failed=skipped is not None and bool(skipped.faults))
    if skipped is not None and share.leads:
        skipped.complain()
    return 0


def _single(args: SampleArgs, share: Share) -> dict[ClipRequest, Path]:
    assert args.prompt is not None
    request = ClipRequest(
        slug(args.prompt), args.prompt, args.seed, args.steps, args.seconds, None, args.sampler.audio_seed
    )
    check_request(request)
    out = args.out if args.out is not None else Path("out") / f"{request.stem}.mp4"
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"--out {str(out)!r} must be a file name ending in .mp4")
    if share.count > 1:
        raise UsageError(
            f"{share.place.world} processes for one clip; expected --cfg-parallel and --seq-parallel with that "
            "product, or --prompts, of which each process makes its share"
        )
    return {request: out}


def _run(
    args: SampleArgs,
    jobs: Mapping[ClipRequest, Path],
    skipped: SkippedRows | None,
    share: Share,
    full: bool,
) -> None:
    """Make what is not finished of this process's share of the clips."""
    console = output()
    same = identity(args, full)
    wanted = {request: _record(request, args) | same for request in jobs}
    todo = list(jobs)
    if skipped is not None:
        todo = share.agreed([request for request, out in jobs.items() if not is_finished(out, wanted[request])])
        if share.leads:
            which = f"share {share.index + 1} of {share.count}: " if share.count > 1 else ""
            console.print(f"{which}{len(jobs)} rows, {len(jobs) - len(todo)} already finished")
    if todo:
        if share.leads:
            prepare([jobs[request] for request in todo])
        started = time.perf_counter()
        pipe = _load(args)
        load_seconds = time.perf_counter() - started
        only = share.count == 1 and len(todo) == len(jobs)
        todo = _usable(pipe, todo, args, skipped, only)
    if skipped is not None and share.leads:
        skipped.write()
        if skipped.faults:
            console.print(str(skipped))
    if not todo:
        return
    share.parallelize(pipe)
    streamed = None
    if full and share.leads:
        from javis.decode.stream import StreamedClips

        streamed = pipe.frames_to = StreamedClips()

    def call(group: Sequence[ClipRequest], progress: Callable[[int, int], None]) -> ClipBatch:
        if streamed is not None:
            streamed.begin([jobs[request] for request in group])
        return pipe(
            [request.prompt for request in group],
            seconds=group[0].seconds,
            steps=group[0].steps,
            guidance=args.guidance,
            audio_guidance=args.audio_guidance,
            order=args.order,
            seed=[request.seed for request in group],
            audio_seed=[request.audio_seed for request in group if request.audio_seed is not None] or None,
            batch_size=args.batch_size if args.best_of > 1 else len(group),
            progress=progress,
            **call_options(args, full),
            **_choices(args),
        )

    def write(batch: ClipBatch, index: int, request: ClipRequest) -> str:
        return save(
            batch,
            index,
            jobs[request],
            wanted[request],
            scale_to=scale_to(args, full),
            load_seconds=load_seconds,
            world=pipe.description.get("world") == "javis",
            streamed=streamed,
        )

    with streamed or contextlib.nullcontext():
        _make(todo, args.batch_size, call, write, skipped, share)


Call = Callable[[Sequence[ClipRequest], Callable[[int, int], None]], "ClipBatch"]
Write = Callable[["ClipBatch", int, ClipRequest], str]


def _make(
    todo: Sequence[ClipRequest], batch_size: int, call: Call, write: Write, skipped: SkippedRows | None, share: Share
) -> None:
    """Make and write clips, those that can be denoised together in batches.

    A row that fails is skipped, and what failed in a batch is made one by one; a full disk, an interruption, and any
    failure where processes make a clip together (the others would wait for this one) end it.
    """
    import torch

    console = output()
    done = 0
    bar_is_drawn = share.shows and output(stderr=True).is_terminal  # lines between would tear it: they come after it
    written: list[str] = []

    def failed(request: ClipRequest, error: Exception) -> None:
        if skipped is None or request.line is None or share.together > 1:
            raise error
        skipped.faults.append(Fault(request.line, str(error) or "out of memory"))
        skipped.write()

    def clips(group: Sequence[ClipRequest]) -> Iterator[tuple[ClipBatch, int, ClipRequest]]:
        try:
            batch = call(group, _clips_done(advance, done, len(group)))
        except (FailedError, MemoryError, torch.OutOfMemoryError) as error:
            if len(group) == 1 or share.together > 1:
                failed(group[0], error)
            else:
                for request in group:
                    yield from clips([request])
            return
        for index, request in enumerate(group):
            yield batch, index, request

    try:
        with progress_bar("sampling", len(todo), hidden=not share.shows) as advance:
            for group in _groups(todo, batch_size):
                for batch, index, request in clips(group):
                    if share.leads:
                        try:
                            written.append(write(batch, index, request))
                        except FailedError as error:
                            failed(request, error)
                    done += 1
                    if written and not bar_is_drawn:
                        console.print(written.pop())
    except KeyboardInterrupt:
        if skipped is None:
            raise
        left = len(todo) - done
        raise KeyboardInterrupt(f"{left} of {len(todo)} clips are left; the same command goes on from here") from None
    finally:
        for line in written:
            console.print(line)


def _clips_done(advance: Callable[[float], None], before: int, size: int) -> Callable[[int, int], None]:
    """Turn the pipeline's (step, steps) into clips done: ``before``, plus a share of the ``size`` in work."""
    return lambda step, steps: advance(before + size * step / steps)


def _record(request: ClipRequest, args: SampleArgs) -> dict[str, Any]:
    """What a finished clip's json must hold so that the clip need not be made again."""
    record = {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": request.steps,
        "seconds": request.seconds,
        "guidance": args.guidance,
        "audio_guidance": args.audio_guidance,
        "order": args.order,
        **_choices(args),
    }
    return record if request.audio_seed is None else record | {"audio_seed": request.audio_seed}


def _choices(args: SampleArgs) -> dict[str, Any]:
    """Of variant and best-of what is not the default."""
    given: dict[str, Any] = {} if args.variant is None else {"variant": args.variant}
    return given if args.best_of == 1 else given | {"best_of": args.best_of}


def _load(args: SampleArgs) -> JavisPipeline:
    return load_pipeline(args)


def _usable(
    pipe: JavisPipeline,
    requests: Sequence[ClipRequest],
    args: SampleArgs,
    skipped: SkippedRows | None,
    only: bool,
) -> list[ClipRequest]:
    """The requests that this checkpoint can make, before anything is generated; the others are noted as skipped.

    Raises:
        UsageError: it can make none of them, and these are all there are (``only``).
    """
    from javis.generation import sampler_of
    from javis.variants import choose_variant, variant_sampling

    usable = []
    options = args.sampler.given()
    for request in requests:
        try:
            pipe.captions([request.prompt])
            if request.seconds is not None:
                pipe.frames_of(request.seconds)
            if options:
                named = {
                    name: getattr(args, name) for name in ("guidance", "audio_guidance", "order", "negative_prompt")
                }
                choice = choose_variant(pipe.description, args.variant, options | named | {"steps": request.steps})
                sampling = variant_sampling(pipe.description, choice.variant)
                steps = sampling["steps"] if request.steps is None else request.steps
                sampler_of(sampling, options, steps=steps, order=args.order or sampling.get("order", "together"))
            usable.append(request)
        except UsageError as error:
            if request.line is None or skipped is None:
                raise
            skipped.faults.append(Fault(request.line, str(error)))
    if only and not usable and skipped is not None:
        raise UsageError(f"{skipped.csv}: {list_faults(sorted(skipped.faults))}; nothing was generated")
    return usable


def _groups(requests: Sequence[ClipRequest], batch_size: int) -> Iterator[list[ClipRequest]]:
    """Requests that can be denoised together, in the order of their first member."""
    alike: dict[tuple[object, ...], list[ClipRequest]] = {}
    for request in requests:
        alike.setdefault((request.steps, request.seconds, request.audio_seed is None), []).append(request)
    for members in alike.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


__all__ = ["ClipRequest", "SampleArgs", "main", "save"]
