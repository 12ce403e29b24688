"""Best of N: several clips of a prompt from different noise; the one whose picture and sound agree best is kept.

Candidate 0 has the clip's own seed and is the clip without best-of; the seeds of the others are derived from it.
The score (:mod:`javis.eval.sync_score`) sees picture and sound alone: no weights, no prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from javis.batches import generate
from javis.clip_batch import Candidate, ClipBatch
from javis.console import progress_bar
from javis.errors import UsageError
from javis.generation import Settings
from javis.requests import MAX_BEST_OF

if TYPE_CHECKING:
    from javis.pipeline import JavisPipeline, StepCallback

Progress = Callable[[int, int], None]
DIGITS = 4  # of a score: candidates that differ by rounding alone are equal, and the first of them is taken


def check_best_of(count: int) -> None:
    """Raise `UsageError` unless ``count`` is a number of candidates that can be made."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_BEST_OF:
        raise UsageError(f"best_of must be a whole number from 1 to {MAX_BEST_OF}, got {count}")


def candidate_seeds(seed: int, count: int) -> list[int]:
    """Seeds of ``count`` candidates: ``seed`` itself, then numbers in 0..2^63-1 that depend on it and their place."""
    states = [np.random.SeedSequence([seed, place]).generate_state(2, np.uint64)[1] for place in range(1, count)]
    return [seed, *(int(state >> np.uint64(1)) for state in states)]


def generate_best(
    count: int,
    pipe: JavisPipeline,
    captions: list[str],
    seeds: list[int],
    asked: Settings,
    progress: Progress | None = None,
    callback: StepCallback | None = None,
    *,
    audio_seeds: list[int] | None = None,
    **others: list[str] | None,
) -> ClipBatch:
    """The best of ``count`` clips of every caption; other arguments as in :func:`javis.batches.generate`.

    A seed of the sound's own stays the same for all candidates of a clip. Candidates are made ``asked.batch_size`` at a
    time, and no more than the best so far of each clip are kept.
    """
    from javis.eval.sync_score import sync_score

    clips = [clip for clip in range(len(captions)) for _ in range(count)]
    tried = [seed for own in seeds for seed in candidate_seeds(own, count)]
    scores: list[list[Candidate]] = [[] for _ in captions]
    best: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    caches: dict[int, dict[str, Any]] = {}
    spent: dict[str, float] = {}
    starts = range(0, len(clips), asked.batch_size)
    with _progress(pipe, progress, len(starts)) as report, _whole_clips(pipe):
        for number, start in enumerate(starts):
            part = slice(start, start + asked.batch_size)
            batch = generate(
                pipe,
                [captions[clip] for clip in clips[part]],
                tried[part],
                asked,
                None if report is None else report(number),
                callback,
                audio_seeds=_of(audio_seeds, clips[part]),
                **{name: _of(given, clips[part]) for name, given in others.items()},
            )
            started = time.perf_counter()
            for index, (clip, seed) in enumerate(zip(clips[part], tried[part], strict=True)):
                video, audio = batch.video[index], batch.audio[index]
                score = round(sync_score(video, audio, batch.fps, batch.sample_rate), DIGITS)
                if clip not in best or score > max(candidate.score for candidate in scores[clip]):
                    best[clip] = (video.copy(), audio.copy())
                    caches |= {} if batch.caches is None else {clip: batch.caches[index]}
                scores[clip].append(Candidate(seed, score))
            for name, value in {**batch.seconds_per_stage, "sync_score": time.perf_counter() - started}.items():
                spent[name] = spent.get(name, 0.0) + value
    return dataclasses.replace(
        batch,
        video=np.stack([best[clip][0] for clip in range(len(captions))]),
        audio=np.stack([best[clip][1] for clip in range(len(captions))]),
        prompts=captions,
        seeds=[own[chosen(own)].seed for own in scores],
        seconds_per_stage={name: round(value, 4) for name, value in spent.items()},
        candidates=scores,
        caches=[caches[clip] for clip in range(len(captions))] if caches else None,
        audio_seeds=audio_seeds,
    )


def chosen(candidates: list[Candidate]) -> int:
    """Place of the best: the first one with the highest score."""
    return max(range(len(candidates)), key=lambda place: (candidates[place].score, -place))


def _of(given: list[Any] | None, clips: list[int]) -> list[Any] | None:
    """What was given for each clip, for candidates of these clips."""
    return None if given is None else [given[clip] for clip in clips]


@contextlib.contextmanager
def _whole_clips(pipe: JavisPipeline) -> Iterator[None]:
    """No frames go to files while clips are decoded: which clip is kept is known later."""
    frames_to, pipe.frames_to = pipe.frames_to, None
    try:
        yield
    finally:
        pipe.frames_to = frames_to


@contextlib.contextmanager
def _progress(
    pipe: JavisPipeline, progress: Progress | None, batches: int
) -> Iterator[Callable[[int], Progress] | None]:
    """Makes what is told (steps done, steps in all) of one batch tell it of all of them."""
    if progress is not None:
        given = progress
        yield lambda number: lambda done, steps: given(number * steps + done, batches * steps)
    elif pipe.shows_progress:
        with progress_bar("denoising", batches) as advance:
            yield lambda number: lambda done, steps: advance(number + done / steps)
    else:
        yield None
