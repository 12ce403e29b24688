"""Negatives whose sound is changed; kinds, tolerances and what all negatives hold to are in negatives.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from javis.data.negatives import (
    ATTEMPTS,
    DECAY,
    MIN_GAIN_DB,
    MIN_SHIFT,
    RAMP,
    TOLERANCE,
    Negative,
    NoNegative,
    Waveform,
    draw_shift,
    until_asynchronous,
)


def audio_add(
    waveform: Waveform,
    rng: np.random.Generator,
    *,
    rate: int,
    events: Sequence[float],
    source: Waveform,
    source_events: Sequence[float],
) -> Negative:
    """Add the sound of another clip, as loud as this one (within 3 dB) and moved in time.

    Args:
        waveform: [samples].
        rng: source of the draw.
        rate: samples per second.
        events: times of what is seen and heard, seconds; may be empty.
        source: mono waveform to add, of any length.
        source_events: its onsets, seconds.

    Raises:
        NoNegative: the source is silent or has no onsets, or they fall on those of the clip wherever it is put.
    """
    loudest = float(np.abs(source).max(initial=0.0))
    if loudest == 0 or not source_events:
        raise NoNegative("audio_add: nothing sounds in what is to be added")
    duration, level = len(waveform) / rate, float(np.abs(waveform).max(initial=0.0)) or loudest
    for _ in range(ATTEMPTS):
        shift = round(rng.uniform(-0.25, 0.25) * len(waveform))
        added = [t for t in (e + shift / rate for e in source_events) if 0 <= t < duration - DECAY]
        alone = [t for t in added if all(abs(t - e) > TOLERANCE for e in events)]
        if added and len(alone) >= max(1, len(added) / 2):
            gain = level / loudest * 10 ** (rng.uniform(-3, 3) / 20)
            mixed = waveform + np.float32(gain) * moved(source, shift, len(waveform))
            mixed /= max(1.0, float(np.abs(mixed).max()))
            changes = {"seconds": shift / rate, "gain": round(gain, 4), "added": [round(t, 4) for t in added]}
            return Negative("audio_add", waveform=mixed.astype(np.float32), changes=changes)
    raise NoNegative("audio_add: what is to be added sounds whenever the clip does")


def audio_delete(waveform: Waveform, rng: np.random.Generator, *, stems: Sequence[Waveform]) -> Negative:
    """Take one source out of the sound.

    Args:
        waveform: [samples].
        rng: source of the draw.
        stems: the sources apart, [samples] each; from source separation, or exact in the world.

    Raises:
        NoNegative: no stem is within 20 dB of the clip's peak.
    """
    loudest = float(np.abs(waveform).max(initial=0.0))
    heard = [i for i, stem in enumerate(stems) if loudest and float(np.abs(stem).max()) > 0.1 * loudest]
    if not heard:
        raise NoNegative("audio_delete: no source of its own is heard; give the sources apart (stems)")
    index = heard[int(rng.integers(len(heard)))]
    changed = np.clip(waveform - stems[index], -1, 1).astype(np.float32)
    return Negative("audio_delete", waveform=changed, changes={"stem": index})


def audio_volume(waveform: Waveform, rng: np.random.Generator, *, rate: int, events: Sequence[float]) -> Negative:
    """Multiply by a gain curve, linear in decibels between 3 to 5 random points from -36 to +6 dB.

    Arguments as in :func:`audio_shift`. Raises NoNegative where no curve changes half of the events by ``MIN_GAIN_DB``.
    """
    if not events:
        raise NoNegative("audio_volume: no events are heard")
    time = np.arange(len(waveform)) / rate
    for _ in range(ATTEMPTS):
        knots = int(rng.integers(3, 6))
        levels = rng.uniform(-36, 6, knots)
        curve = np.interp(time, np.linspace(0, time[-1], knots), levels)
        changed = waveform * 10 ** (curve / 20)
        down = 20 * np.log10(max(1.0, float(np.abs(changed).max())))  # so that nothing clips
        at_events = np.interp(events, time, curve) - down
        if np.mean(np.abs(at_events) >= MIN_GAIN_DB) >= 0.5:
            changed = (changed * 10 ** (-down / 20)).astype(np.float32)
            return Negative("audio_volume", waveform=changed, changes={"decibel": [round(g, 2) for g in at_events]})
    raise NoNegative("audio_volume: no gain curve changed half of the events")


def audio_shift(waveform: Waveform, rng: np.random.Generator, *, rate: int, events: Sequence[float]) -> Negative:
    """Move the sound by ``MIN_SHIFT`` to 40 % of the clip, later or earlier; the edge is silent.

    Args:
        waveform: [samples].
        rng: source of the draw.
        rate: samples per second.
        events: times of what is seen and heard, seconds.

    Raises:
        NoNegative: there are no events, or events agree whatever the shift.
    """
    duration = len(waveform) / rate

    def draw() -> tuple[list[float], Callable[[], Negative]]:
        shift = round(draw_shift(rng, duration) * rate)
        heard = [t for t in (e + shift / rate for e in events) if 0 <= t < duration]

        def make() -> Negative:
            changed = moved(waveform, shift, len(waveform))
            if shift < 0 and abs(changed[0]) > 0:
                fade(changed, 0, rate, rising=True)
            return Negative("audio_shift", waveform=changed, changes={"seconds": shift / rate})

        return heard, make

    return until_asynchronous("audio_shift", draw, events)


def audio_mute(waveform: Waveform, rng: np.random.Generator, *, rate: int, events: Sequence[float]) -> Negative:
    """Silence 20 to 60 % of the clip, so that at least half of its events are gone. Arguments as in audio_shift."""
    duration = len(waveform) / rate

    def draw() -> tuple[list[float], Callable[[], Negative]]:
        length = rng.uniform(0.2, 0.6) * duration
        start = rng.uniform(-0.5 * length, duration - 0.5 * length)
        begin, end = max(0.0, start), min(duration, start + length)
        # An event counts as muted only if the silence covers the most of its sound.
        heard = [e for e in events if not begin + RAMP <= e <= (end if end >= duration else end - DECAY)]

        def make() -> Negative:
            a, b, ramp = round(begin * rate), round(end * rate), round(RAMP * rate)
            gain: Waveform = np.ones(len(waveform), dtype=np.float32)
            gain[a:b] = 0
            if a > 0:
                gain[a : a + ramp] = np.linspace(1, 0, ramp)
            if b < len(waveform):
                gain[b - ramp : b] = np.linspace(0, 1, ramp)
            return Negative("audio_mute", waveform=waveform * gain, changes={"begin": a / rate, "end": b / rate})

        return heard, make

    return until_asynchronous("audio_mute", draw, events)


def audio_repeat(waveform: Waveform, rng: np.random.Generator, *, rate: int, events: Sequence[float]) -> Negative:
    """Let a stretch with at least one event sound twice in a row; the rest comes later. Arguments as in audio_shift."""
    duration = len(waveform) / rate

    def draw() -> tuple[list[float], Callable[[], Negative]]:
        length = rng.uniform(MIN_SHIFT, max(MIN_SHIFT, 0.4 * duration))
        a = round(rng.uniform(0, duration - length) * rate)
        b = a + round(length * rate)
        again = [e + (b - a) / rate for e in events if a / rate <= e < b / rate - RAMP]
        later = [e + (b - a) / rate for e in events if e >= b / rate]
        heard = [t for t in sorted([*(e for e in events if e < b / rate), *again, *later]) if t < duration]

        def make() -> Negative:
            segment, rest = waveform[a:b].copy(), waveform[b:].copy()
            fade(segment, 0, rate, rising=True)
            fade(rest, 0, rate, rising=True)
            changed = np.concatenate([waveform[:b], segment, rest])[: len(waveform)]
            return Negative("audio_repeat", waveform=changed, changes={"begin": a / rate, "end": b / rate})

        return (heard if again else list(events)), make

    return until_asynchronous("audio_repeat", draw, events)


def audio_speed(waveform: Waveform, rng: np.random.Generator, *, rate: int, events: Sequence[float]) -> Negative:
    """Play 1.3 to 2 times faster (then silence) or slower (cut), pitch included. Arguments as in audio_shift."""
    duration = len(waveform) / rate

    def draw() -> tuple[list[float], Callable[[], Negative]]:
        factor = float(np.exp(rng.uniform(np.log(1.3), np.log(2.0))))
        factor = factor if rng.random() < 0.5 else 1 / factor
        heard = [e / factor for e in events if e / factor < duration]

        def make() -> Negative:
            spectrum = np.fft.rfft(waveform.astype(np.float64))
            spectrum[int(len(spectrum) / max(1.0, factor)) :] = 0  # what would alias
            smooth = np.fft.irfft(spectrum, len(waveform))
            position = np.arange(len(waveform)) * factor
            changed = np.interp(position, np.arange(len(waveform)), smooth, right=0.0)
            changed = np.clip(changed, -1, 1).astype(np.float32)
            return Negative("audio_speed", waveform=changed, changes={"factor": factor})

        return heard, make

    return until_asynchronous("audio_speed", draw, events)


def moved(waveform: Waveform, shift: int, samples: int) -> Waveform:
    """``waveform`` that many samples later (earlier if negative) in ``samples`` samples, with silence around."""
    out: Waveform = np.zeros(samples, dtype=np.float32)
    begin, start = max(0, shift), max(0, -shift)
    length = max(0, min(samples - begin, len(waveform) - start))
    out[begin : begin + length] = waveform[start : start + length]
    return out


def fade(waveform: Waveform, at: int, rate: int, *, rising: bool) -> None:
    """Fade in (or out) over ``RAMP`` from sample ``at`` on, in place."""
    part = waveform[at : at + round(RAMP * rate)]
    ramp = np.linspace(0, 1, len(part), dtype=np.float32)
    part *= ramp if rising else ramp[::-1]
