"""Negatives of any kind by name: what a clip and the material for it must hold, and the dispatch.

Real clips know neither when things happen nor their sources apart: :func:`describe` hears the events, and a masklet is
what differs from the still background (:func:`masklet_of`). The synthetic world knows both (negatives_world.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from javis.data import negatives as n
from javis.data import negatives_sound as sounds
from javis.data.negatives import KINDS, MOVING, Masklet, Negative, NoNegative, Video, Waveform

SAME_SOUND = 0.9  # cosine of two long-time spectra from which on two sounds count as the same
SPECTRUM_BANDS = 32


@dataclass(frozen=True)
class Clip:
    """A clip whose picture and sound belong together."""

    video: Video  # [T, H, W, 3]
    waveform: Waveform  # [samples]
    fps: float
    rate: int  # samples per second
    events: tuple[float, ...]  # times at which something is seen and heard, seconds
    points: NDArray[np.float64] | None = None  # [N, 2], x and y in pixels of what sounds, event by event; None: unknown
    stems: tuple[Waveform, ...] = ()  # the sources apart, [samples] each; () where they are not known


@dataclass(frozen=True)
class Material:
    """What is pasted and added: from another clip of the data set."""

    masklet: Masklet | None
    source: Waveform | None  # mono
    source_events: tuple[float, ...] = ()


def describe(video: Video, waveform: Waveform, *, fps: float, rate: int, stems: Sequence[Waveform] = ()) -> Clip:
    """A clip of which nothing is known but picture and sound: its events are the onsets of the sound."""
    from javis.eval.onsets import audio_onsets

    events = tuple(event.time for event in audio_onsets(waveform, rate))
    return Clip(video, waveform, fps, rate, events, stems=tuple(stems))


def material_of(clip: Clip, rng: np.random.Generator) -> Material:
    """What another clip can take from this one: a masklet, and one of its sources (or all of its sound)."""
    from javis.eval.onsets import audio_onsets

    masklet = masklet_of(clip.video)
    if not clip.stems:
        return Material(masklet, clip.waveform if clip.events else None, clip.events)
    source = clip.stems[int(rng.integers(len(clip.stems)))]
    return Material(masklet, source, tuple(event.time for event in audio_onsets(source, clip.rate)))


def masklet_of(video: Video) -> Masklet | None:
    """Cut out what differs from the still background, the median over time; None if that is under 0.5 % or over 50 %.

    A rough masklet, good for a still camera; a segmentation model gives better ones.
    """
    background = np.median(video, axis=0)
    alpha = (np.abs(video - background).max(axis=3) > MOVING).astype(np.float32)
    return Masklet(video, alpha) if 0.005 <= float(alpha.mean()) <= 0.5 else None


def sounds_alike(a: Waveform, b: Waveform) -> bool:
    """Whether two sounds have nearly the same long-time spectrum (cosine over 32 log-spaced bands)."""
    spectra = [_band_levels(wave) for wave in (a, b)]
    norms = [float(np.linalg.norm(s)) for s in spectra]
    return min(norms) > 0 and float(spectra[0] @ spectra[1]) / (norms[0] * norms[1]) >= SAME_SOUND


def _band_levels(waveform: Waveform) -> NDArray[np.float64]:
    power = np.abs(np.fft.rfft(waveform.astype(np.float64))) ** 2
    edges = np.unique(np.geomspace(len(power) / 256, len(power), SPECTRUM_BANDS + 1).astype(int))
    return np.sqrt(np.add.reduceat(power, edges[:-1]))


def make_negative(kind: str, clip: Clip, material: Material | None, rng: np.random.Generator) -> Negative:
    """A negative of the named kind.

    Args:
        kind: one of ``KINDS``.
        clip: the positive.
        material: from another clip; only video_masklet and audio_add need it.
        rng: source of the draw.

    Raises:
        NoNegative: this clip (with this material) has none.
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    video, waveform, events, rate = clip.video, clip.waveform, clip.events, clip.rate
    if kind == "video_grid_mask":
        return n.video_grid_mask(video, rng, points=clip.points)
    if kind == "video_masklet":
        if material is None or material.masklet is None:
            raise NoNegative("video_masklet: needs an object cut out of another clip")
        return n.video_masklet(video, rng, masklet=material.masklet)
    if kind == "audio_add":
        if material is None or material.source is None:
            raise NoNegative("audio_add: needs a sound of another clip")
        if sounds_alike(waveform, material.source):
            raise NoNegative("audio_add: the other clip sounds like this one")
        return sounds.audio_add(
            waveform, rng, rate=rate, events=events, source=material.source, source_events=material.source_events
        )
    if kind == "audio_delete":
        return sounds.audio_delete(waveform, rng, stems=clip.stems)
    if KINDS[kind].modality == "video":
        make_video = {"video_shift": n.video_shift, "video_stall": n.video_stall}[kind]
        return make_video(video, rng, fps=clip.fps, events=events)
    make_audio = {
        "audio_volume": sounds.audio_volume,
        "audio_shift": sounds.audio_shift,
        "audio_mute": sounds.audio_mute,
        "audio_repeat": sounds.audio_repeat,
        "audio_speed": sounds.audio_speed,
    }[kind]
    return make_audio(waveform, rng, rate=rate, events=events)
