"""Damage of known kind and size to clips whose picture and sound belong together.

A metric of synchrony is checked with pairs (clip, damaged clip): the damaged one must score lower
(:mod:`javis.eval.validate`). Functions take raw clips and draw from a numpy ``Generator``: same generator, same damage.
Every one has the signature of :class:`Damage`. ``level`` in (0, 1] says how much; what 1 stands for:

| kind | level 1 |
|---|---|
| audio_shift | sound 0.5 s earlier or later, silence at the edge |
| audio_drop | all events silenced; at least one at any level |
| audio_extra | 4 more sounds where nothing happens; at least one |
| audio_jitter | every event's sound 0.3 s earlier or later, each by its own sign |
| audio_swap | the whole sound is another clip's; less: that share of it, at the end |
| audio_speed | twice as fast or half as fast, pitch included |
| audio_mute | all silent; less: a stretch of that share, over an event |
| audio_repeat | 0.5 s sound twice, what follows comes that much later |
| audio_noise | white noise 10 dB above the sound; less: 40 dB below that at 0, in proportion |
| video_shift | picture 0.5 s earlier or later, in whole frames; the edge frame is held |
| video_swap | the whole picture is another clip's; less: that share of it, at the end |
| video_speed | twice as fast or half as fast, nearest frames |
| video_freeze | one frame for all of the clip; less: for a stretch of that share, over an event |
| video_stall | a frame is held for 0.5 s before an event, what follows comes that much later |
| video_judder | 8 frames become one, and its first frame stands for all of them |
| video_mask | 80 % of the picture black, in cells of a 6 x 6 grid, those that move most first |
| video_noise | Gaussian noise of 100 levels (of 255) |
| video_blur | Gaussian blur of 10 % of the frame's side |

The kinds of asynchronous twins that training contrasts (javis/data/negatives.py) draw how strong they are by
themselves, and refuse clips for which they would not be asynchronous. Here the strength is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from javis.data.negatives import Video, Waveform
from javis.data.negatives_sound import fade, moved

MAX_SHIFT = 0.5  # seconds
MAX_JITTER = 0.3  # seconds
MAX_EXTRA = 4  # sounds
TAIL = 0.35  # seconds after an onset that count as its sound; the world's are over then
ONSET = 0.004  # seconds before an onset that go with it
FREE = 0.15  # seconds that an extra sound keeps from every event
NOISE_DB = (30.0, -10.0)  # signal to noise at level 0 and 1
NOISE_LEVELS = 100.0  # of 255
GRID = 6


class NoDamage(ValueError):
    """The clip cannot be damaged in this way; the message says why."""


class Damage(Protocol):
    """Makes a damaged clip of a clip.

    Args:
        video: uint8 [T, H, W, 3]. waveform: float32 [samples]. fps, rate: frames and samples per second.
        rng: source of the draw. level: in (0, 1].
        events: times (s) at which something is seen and heard; None: the onsets that are heard.
        other: picture and sound of another clip, of any length (only the swaps need it).

    Returns:
        Picture and sound, of the same shapes; the one that is not damaged is the given array itself.

    Raises:
        NoDamage: this clip cannot be damaged so.
        ValueError: a level outside (0, 1].
    """

    def __call__(
        self, video: Video, waveform: Waveform, fps: float, rate: int, rng: np.random.Generator, level: float,
        *, events: Sequence[float] | None = None, other: tuple[Video, Waveform] | None = None,
    ) -> tuple[Video, Waveform]: ...  # fmt: skip


@dataclass(frozen=True)
class _Clip:
    video: Video
    waveform: Waveform
    fps: float
    rate: int
    rng: np.random.Generator
    level: float
    events: list[float]
    other: tuple[Video, Waveform] | None

    @property
    def seconds(self) -> float:
        return len(self.waveform) / self.rate

    def sign(self) -> int:
        return 1 if self.rng.random() < 0.5 else -1

    def an_event(self) -> float:
        if not self.events:
            raise NoDamage("no event is heard")
        return self.events[int(self.rng.integers(len(self.events)))]

    def stretch(self, seconds: float) -> tuple[float, float]:
        """A stretch of that length, within the clip, that holds an event."""
        event, seconds = self.an_event(), min(seconds, self.seconds)
        first = max(0.0, event - seconds + min(0.1, seconds))
        last = min(self.seconds - seconds, max(0.0, event - 0.01))
        begin = float(self.rng.uniform(min(first, last), last))
        return begin, begin + seconds


DAMAGES: dict[str, Damage] = {}


def _damage(make: Callable[[_Clip], Video | Waveform]) -> Callable[[_Clip], Video | Waveform]:
    """Put ``make`` into ``DAMAGES`` under its name; it returns the stream that its name begins with."""
    name = make.__name__.strip("_")

    def damage(
        video: Video, waveform: Waveform, fps: float, rate: int, rng: np.random.Generator, level: float,
        *, events: Sequence[float] | None = None, other: tuple[Video, Waveform] | None = None,
    ) -> tuple[Video, Waveform]:  # fmt: skip
        if not 0 < level <= 1:
            raise ValueError(f"level is {level}, expected above 0 and at most 1")
        if events is None:
            from javis.eval.onsets import audio_onsets

            events = [event.time for event in audio_onsets(waveform, rate)]
        clip = _Clip(video, waveform, fps, rate, rng, level, sorted(events), other)
        changed = make(clip)
        if name.startswith("video"):
            return np.ascontiguousarray(changed, dtype=np.uint8), waveform
        return video, np.ascontiguousarray(changed, dtype=np.float32)

    DAMAGES[name] = damage
    return make


# -- sound ------------------------------------------------------------------------------------------------------------


@_damage
def _audio_shift(c: _Clip) -> Waveform:
    return shift_sound(c.waveform, c.sign() * MAX_SHIFT * c.level, c.rate)


def shift_sound(waveform: Waveform, seconds: float, rate: int) -> Waveform:
    """The sound [samples] that much later (earlier if negative), with silence at the edge."""
    samples = round(seconds * rate)
    changed = moved(waveform, samples, len(waveform))
    if samples < 0:
        fade(changed, 0, rate, rising=True)
    return changed


@_damage
def _audio_drop(c: _Clip) -> Waveform:
    c.an_event()
    count = max(1, round(c.level * len(c.events)))
    changed = c.waveform.copy()
    for index in c.rng.permutation(len(c.events))[:count]:
        begin, end = _span(c, int(index))
        changed[begin:end] = 0
    return changed


@_damage
def _audio_extra(c: _Clip) -> Waveform:
    pieces = [c.waveform[slice(*_span(c, i))] for i in range(len(c.events))]
    pieces = [piece for piece in pieces if len(piece) > 0.05 * c.rate and np.abs(piece).max() > 0.01]
    if not pieces:
        raise NoDamage("no sound stands alone long enough to be heard once more")
    changed, taken = c.waveform.copy(), list(c.events)
    for _ in range(max(1, round(MAX_EXTRA * c.level))):
        grid = np.arange(0.03, c.seconds - 0.1, 0.01)
        free = [t for t in grid if all(abs(t - u) >= FREE for u in taken)]
        if not free:
            break
        time = float(free[int(c.rng.integers(len(free)))])
        taken.append(time)
        piece = pieces[int(c.rng.integers(len(pieces)))]
        begin = round((time - ONSET) * c.rate)
        piece = piece[: len(changed) - begin]
        changed[begin : begin + len(piece)] += piece
    if len(taken) == len(c.events):
        raise NoDamage("no moment is far enough from every event")
    return np.clip(changed, -1, 1)


@_damage
def _audio_jitter(c: _Clip) -> Waveform:
    c.an_event()
    changed: Waveform = np.zeros_like(c.waveform)
    for index in range(len(c.events)):
        begin, end = _span(c, index)
        piece: Waveform = np.zeros_like(c.waveform)
        piece[begin:end] = c.waveform[begin:end]
        changed += moved(piece, round(c.sign() * MAX_JITTER * c.level * c.rate), len(piece))
    return np.clip(changed, -1, 1)


@_damage
def _audio_swap(c: _Clip) -> Waveform:
    if c.other is None:
        raise NoDamage("needs another clip")
    theirs = moved(c.other[1], 0, len(c.waveform))
    begin = round((1 - c.level) * len(theirs))
    changed = np.concatenate([c.waveform[:begin], theirs[begin:]])
    if begin:
        fade(changed, begin, c.rate, rising=True)
    return changed


@_damage
def _audio_speed(c: _Clip) -> Waveform:
    factor = 2.0 ** (c.sign() * c.level)
    return np.interp(np.arange(len(c.waveform)) * factor, np.arange(len(c.waveform)), c.waveform, right=0.0)


@_damage
def _audio_mute(c: _Clip) -> Waveform:
    begin, end = (round(t * c.rate) for t in c.stretch(c.level * c.seconds))
    changed = c.waveform.copy()
    changed[begin:end] = 0
    if end < len(changed):
        fade(changed, end, c.rate, rising=True)
    return changed


@_damage
def _audio_repeat(c: _Clip) -> Waveform:
    length = MAX_SHIFT * c.level
    early = [event for event in c.events if event + length < c.seconds - ONSET]
    if not early:
        raise NoDamage("no event is early enough to sound twice")
    begin = round(max(0.0, early[int(c.rng.integers(len(early)))] - ONSET) * c.rate)
    end = begin + round(length * c.rate)
    return np.concatenate([c.waveform[:end], c.waveform[begin:]])[: len(c.waveform)]


@_damage
def _audio_noise(c: _Clip) -> Waveform:
    level = float(np.sqrt(np.mean(c.waveform.astype(np.float64) ** 2)))
    if level == 0:
        raise NoDamage("the clip is silent")
    decibel = NOISE_DB[0] + (NOISE_DB[1] - NOISE_DB[0]) * c.level
    noise = c.rng.standard_normal(len(c.waveform)) * level * 10 ** (-decibel / 20)
    changed = c.waveform + noise
    return changed / max(1.0, float(np.abs(changed).max()))


def _span(c: _Clip, index: int) -> tuple[int, int]:
    """First and last sample of an event's sound: until the next one, at most ``TAIL``."""
    begin = max(0.0, c.events[index] - ONSET)
    end = c.events[index] + TAIL
    if index + 1 < len(c.events):
        end = min(end, c.events[index + 1] - ONSET)
    return round(begin * c.rate), min(len(c.waveform), round(end * c.rate))


# -- picture ----------------------------------------------------------------------------------------------------------


@_damage
def _video_shift(c: _Clip) -> Video:
    frames = c.sign() * max(1, round(MAX_SHIFT * c.level * c.fps))
    return c.video[np.clip(np.arange(len(c.video)) - frames, 0, len(c.video) - 1)]


@_damage
def _video_swap(c: _Clip) -> Video:
    if c.other is None or c.other[0].shape[1:] != c.video.shape[1:]:
        raise NoDamage("needs another clip of the same size")
    theirs = c.other[0][np.minimum(np.arange(len(c.video)), len(c.other[0]) - 1)]
    begin = min(len(theirs) - 1, round((1 - c.level) * len(theirs)))
    return np.concatenate([c.video[:begin], theirs[begin:]])


@_damage
def _video_speed(c: _Clip) -> Video:
    factor = 2.0 ** (c.sign() * c.level)
    return c.video[np.minimum(np.round(np.arange(len(c.video)) * factor).astype(int), len(c.video) - 1)]


@_damage
def _video_freeze(c: _Clip) -> Video:
    begin, end = c.stretch(c.level * c.seconds)
    first, last = _frame(c, begin), max(_frame(c, begin) + 2, round(end * c.fps))
    changed = c.video.copy()
    changed[first:last] = c.video[first]
    return changed


@_damage
def _video_stall(c: _Clip) -> Video:
    at, held = _frame(c, c.an_event() - 0.06), max(1, round(MAX_SHIFT * c.level * c.fps))
    index = np.concatenate([np.arange(at), np.full(held, at), np.arange(at, len(c.video))])
    return c.video[index[: len(c.video)]]


@_damage
def _video_judder(c: _Clip) -> Video:
    step = 1 + max(1, round(7 * c.level))
    return c.video[np.arange(len(c.video)) // step * step]


@_damage
def _video_mask(c: _Clip) -> Video:
    change = np.abs(np.diff(c.video.astype(np.int16), axis=0)).mean(axis=(0, 3)) if len(c.video) > 1 else 0.0
    height, width = c.video.shape[1:3]
    cell = (np.arange(height) * GRID // height)[:, None] * GRID + (np.arange(width) * GRID // width)[None, :]
    motion = np.bincount(cell.ravel(), np.broadcast_to(change, cell.shape).ravel(), GRID * GRID)
    motion = motion + 1e-9 * c.rng.random(GRID * GRID)  # still cells in random order
    hidden = np.argsort(-motion)[: max(1, round(0.8 * c.level * GRID * GRID))]
    return np.where(np.isin(cell, hidden)[None, :, :, None], np.uint8(0), c.video)


@_damage
def _video_noise(c: _Clip) -> Video:
    noise: NDArray[np.float32] = c.rng.standard_normal(c.video.shape, dtype=np.float32)
    return np.clip(np.round(c.video + noise * np.float32(NOISE_LEVELS * c.level)), 0, 255).astype(np.uint8)


@_damage
def _video_blur(c: _Clip) -> Video:
    deviation = 0.1 * c.level * max(c.video.shape[1:3])
    reach = max(1, int(np.ceil(3 * deviation)))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2).astype(np.float32)
    taps /= taps.sum()
    frames = c.video.astype(np.float32)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (reach, reach)
        wide, length = np.pad(frames, pad, mode="edge"), frames.shape[axis]
        frames = sum(tap * np.take(wide, np.arange(k, k + length), axis) for k, tap in enumerate(taps))  # type: ignore[assignment]
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def _frame(c: _Clip, seconds: float) -> int:
    return int(np.clip(np.floor(seconds * c.fps), 0, len(c.video) - 1))
