"""Onset times of a waveform, of everything that sounds or of each described source alone.

An onset is where short-time magnitudes rise: with a Hann window the magnitude of a sound that starts at once rises
symmetrically around its start, so the steepest point of the rise is the start, whatever window the sound went through
before (a log-mel and back smears it, but to both sides). Magnitudes of everything are summed over bands that rise; the
sources of a caption are told apart by unmixing the spectrum into what each of them would sound like.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from javis.eval.spectral import band_matrix, spectra
from javis.world.synth import PITCHES, SHAPE_SEMITONES, modal_tone

HOP = 0.0025  # seconds between spectra
WINDOW = 0.032  # seconds of a spectrum
LAG = 5  # hops on either side over which a rise is taken
LOUDER = 1.3  # how much louder than before a sound must be to have begun
FLOOR = 0.012  # rise in amplitude (full scale 1) that nothing below counts as a sound
SHARE = 0.28  # of the largest rise of the same source
SHARE_OF_ALL = 0.15  # of the largest rise of any source
MIN_GAP = 0.16  # seconds between onsets of one source
MIN_GAP_ANY = 0.10  # seconds between onsets where the number of sources is unknown
BANDS = 72
LOWEST_HZ = 150.0
UNMIX_STEPS = 60

# Mean offset (s) of the uncorrected times from the truth by timbre (None: unknown), on the world's clips of seeds
# 10,000 to 10,199, halfway between the clean sound and the one that went through a log-mel and back. What dies away at
# once has its steepest rise a little early.
BIAS: dict[str | None, float] = {
    None: -0.0042,
    "wooden": -0.0048,
    "metal": -0.0044,
    "glass": -0.0056,
    "electronic": -0.0016,
}


@dataclass(frozen=True)
class AudioEvent:
    """A sound that starts."""

    time: float  # seconds
    strength: float  # rise in amplitude
    source: int | None  # index of the clause it was heard for; None if there was no clause


class Sound:
    """The spectra of a waveform, so that readers of one clip share the work.

    Attributes:
        magnitude: [frames, bins], with ``frequencies`` [bins] in Hz; frame k is centred on ``k * HOP`` seconds.
        banded: root of the power in ``BANDS`` bands, [frames, BANDS].
    """

    def __init__(self, audio: np.ndarray, sample_rate: int) -> None:
        found = spectra(audio, sample_rate, window_s=WINDOW, hop_s=HOP)
        self.magnitude, self.frequencies = found.magnitude, found.frequencies
        bands = _bands(sample_rate, len(found.frequencies))
        self.banded = np.sqrt(found.magnitude**2 @ bands)

    @classmethod
    def of(cls, audio: np.ndarray | Sound, sample_rate: int) -> Sound:
        """``audio`` itself if it is a Sound, else a new one."""
        return audio if isinstance(audio, Sound) else cls(audio, sample_rate)


@lru_cache(maxsize=8)
def _bands(sample_rate: int, bins: int) -> np.ndarray:
    return band_matrix(np.linspace(0.0, sample_rate / 2, bins), low=LOWEST_HZ, bands=BANDS)


def audio_onsets(audio: np.ndarray | Sound, sample_rate: int, *, min_gap: float = MIN_GAP_ANY) -> list[AudioEvent]:
    """Onsets of everything that sounds, in order of time and at least ``min_gap`` seconds apart.

    ``audio`` is float [N] in [-1, 1].
    """
    total = np.sqrt((band_rise(Sound.of(audio, sample_rate).banded) ** 2).sum(axis=1))
    return [AudioEvent(time - BIAS[None], height, None) for time, height in _peaks(total, 0.0, min_gap)]


def source_onsets(
    audio: np.ndarray | Sound, sample_rate: int, clauses: Sequence[Mapping[str, Any]]
) -> list[AudioEvent]:
    """Onsets of each described source, in order of time.

    Args:
        audio: float [N] in [-1, 1], or a ``Sound`` of it.
        sample_rate: Hz.
        clauses: attributes as ``javis.world.parse_prompt`` gives them (motion, material, size and shape say how it
            sounds; None leaves it open). Clauses of what is silent get no onsets.

    Returns:
        Events whose ``source`` is the index of the clause. A single audible source gets every onset of the clip, so
        that a sound of the wrong kind counts and is not overlooked.
    """
    heard = [index for index, clause in enumerate(clauses) if clause.get("audible", True)]
    sound = Sound.of(audio, sample_rate)
    if len(heard) < 2:
        everything = audio_onsets(sound, sample_rate, min_gap=MIN_GAP)
        if not heard:
            return everything
        shift = BIAS[None] - BIAS[timbre_of(clauses[heard[0]])]
        return [AudioEvent(e.time + shift, e.strength, heard[0]) for e in everything]
    average = sound.magnitude.mean(axis=0)
    dictionaries = [_dictionary(clauses[i], sample_rate, average, sound.frequencies) for i in heard]
    levels = _unmix(sound.banded, dictionaries)
    rises = [band_rise(level[:, None])[:, 0] for level in levels]
    loudest = max(float(rise.max(initial=0.0)) for rise in rises)
    found = [
        AudioEvent(time - BIAS[timbre_of(clauses[index])], height, index)
        for index, rise in zip(heard, rises, strict=True)
        for time, height in _peaks(rise, loudest, MIN_GAP)
    ]
    return sorted(found, key=lambda event: event.time)


def timbre_of(clause: Mapping[str, Any]) -> str | None:
    """Timbre that a clause describes: its material, electronic for what flashes, None if it leaves it open."""
    return "electronic" if clause.get("motion") == "flashes" else clause.get("material")


def nominal_pitch(timbre: str, size: str, shape: str | None) -> float:
    """Middle of the fundamentals (Hz) that the world gives to things of this timbre, size and shape."""
    return PITCHES[timbre][size] * 2 ** (SHAPE_SEMITONES.get(shape or "", 0.0) / 12)


# --- rises and peaks ----------------------------------------------------------------------------------------------


def band_rise(levels: np.ndarray) -> np.ndarray:
    """Rise of ``levels`` [frames, K] from ``LAG`` hops before to ``LAG`` hops after each frame.

    The level before counts ``LOUDER`` times: a tone that wavers is not struck again. The last frames, whose spectra
    reach beyond the clip, have no rise: being cut off is a click, but no event.
    """
    padded = np.pad(levels, ((LAG, LAG), (0, 0)), mode="edge")
    rise = np.maximum(padded[2 * LAG :] - LOUDER * padded[: -2 * LAG], 0.0)
    rise[max(0, len(rise) - LAG - math.ceil(WINDOW / 2 / HOP)) :] = 0.0
    return np.asarray(rise)


def _peaks(rise: np.ndarray, loudest: float, min_gap: float) -> list[tuple[float, float]]:
    """Times (s) and heights of the peaks of ``rise`` [frames] that stand out, at least ``min_gap`` seconds apart."""
    least = max(FLOOR, SHARE * float(rise.max(initial=0.0)), SHARE_OF_ALL * loudest)
    reach = round(min_gap / HOP)
    found: list[int] = []
    for i in np.argsort(-rise, kind="stable"):
        if rise[i] < least:
            break
        if all(abs(i - j) >= reach for j in found):
            found.append(int(i))
    # Above half of its height a peak is nearly symmetric, flat or not; its centre of mass is steadier than its top.
    result = []
    for i in sorted(found):
        low = high = i
        while low > 0 and rise[low - 1] > 0.5 * rise[i] and i - low < reach // 2:
            low -= 1
        while high < len(rise) - 1 and rise[high + 1] > 0.5 * rise[i] and high - i < reach // 2:
            high += 1
        weight = rise[low : high + 1] - 0.5 * rise[i]
        centre = float((weight * np.arange(low, high + 1)).sum() / max(weight.sum(), 1e-12))
        result.append((max(0.0, centre * HOP), float(rise[i])))
    return result


# --- unmixing -----------------------------------------------------------------------------------------------------


def _dictionary(
    clause: Mapping[str, Any], sample_rate: int, average: np.ndarray, frequencies: np.ndarray
) -> np.ndarray:
    """Band spectra [K, BANDS] of what a source may sound like, each of a tone of amplitude about 1.

    What the clause leaves open is covered by one pair of spectra (attack and tail) for each possibility.
    """
    timbres = [timbre_of(clause)] if timbre_of(clause) else ["wooden", "metal", "glass"]
    sizes = [clause["size"]] if clause.get("size") else ["small", "large"]
    rows = []
    for timbre in timbres:
        for size in sizes:
            assert timbre is not None
            pitch = refine_pitch(nominal_pitch(timbre, size, clause.get("shape")), average, frequencies)
            tone = modal_tone(timbre, pitch, sample_rate).astype(np.float64)
            banded = Sound(tone, sample_rate).banded
            rows += [banded[round(seconds / HOP)] for seconds in (0.016, 0.08)]
    stacked = np.stack(rows)
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-9)


def refine_pitch(nominal: float, average: np.ndarray, frequencies: np.ndarray, semitones: float = 1.5) -> float:
    """Frequency (Hz) of the strongest peak within ``semitones`` of ``nominal``, or ``nominal`` if there is none."""
    low, high = (nominal * 2 ** (s / 12) for s in (-semitones, semitones))
    inside = np.flatnonzero((frequencies >= low) & (frequencies <= high))
    if len(inside) < 1:
        return nominal
    k = int(inside[average[inside].argmax()])
    if not 0 < k < len(average) - 1 or average[k] < max(average[k - 1], average[k + 1]):
        return nominal  # only the flank of something else
    a, b, c = np.log(np.maximum(average[k - 1 : k + 2], 1e-12))
    shift = 0.5 * (a - c) / (a - 2 * b + c) if a - 2 * b + c < 0 else 0.0
    return float(frequencies[k] + shift * (frequencies[1] - frequencies[0]))


def _unmix(magnitude: np.ndarray, dictionaries: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Level [frames] of each source: non-negative factors of ``magnitude`` with fixed spectra, and noise beside them.

    Multiplicative updates for the generalised Kullback-Leibler divergence (Lee and Seung 2001, eq. 5); two shapes of
    noise take up the bursts of the impacts.
    """
    bands = magnitude.shape[1]
    ramp = np.linspace(1.0, 0.0, bands)
    noise = np.stack([np.full(bands, 1.0), 0.05 + ramp, 1.05 - ramp])
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    spectra_of = np.concatenate([*dictionaries, noise])
    floor = 1e-4 * max(float(magnitude.max(initial=0.0)), 1e-6)
    target = magnitude + floor
    levels = np.full((len(magnitude), len(spectra_of)), 1.0) * target.mean(axis=1, keepdims=True)
    weights = spectra_of.sum(axis=1)
    for _ in range(UNMIX_STEPS):
        levels *= (target / (levels @ spectra_of + floor)) @ spectra_of.T / weights
    result, start = [], 0
    for rows in dictionaries:
        result.append(np.linalg.norm(levels[:, start : start + len(rows)] @ rows, axis=1))
        start += len(rows)
    return result
