"""What a clip shows and sounds like, read from pixels and waveform by comparison with the world's own templates.

Objects are found by colour without knowing the caption; only the pairing of two objects with two clauses looks at it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from javis.eval.motion import read_motion
from javis.eval.onsets import HOP, Sound, source_onsets, timbre_of
from javis.eval.shape_metric import distances
from javis.eval.tracking import Picture, Track
from javis.world.render import signed_distance
from javis.world.scene import RADII
from javis.world.synth import PITCHES, modal_tone
from javis.world.vocabulary import SHAPES, SIDES

SEEN = ("colour", "shape", "side", "size", "motion")
HEARD = ("timbre", "pitch")

_GRID = 25  # samples across an object window
_BLURS = (0.6, 1.0, 1.5, 2.0)  # pixels of 64
_REACH = 0.17  # frame sides from the centre to the rim of that window
_PATCH_STEPS = 16  # spectra of a sound's patch
_PATCH_STEP_S = 0.010
_SEMITONES = np.arange(-1.5, 1.51, 0.25)


@dataclass(frozen=True)
class SeenObject:
    """Attributes of one object, in the world's words; ``size`` is small or large, ``motion`` may also be rests."""

    colour: str
    shape: str
    side: str
    size: str
    motion: str


@dataclass(frozen=True)
class HeardSource:
    """Class of one source's sound: ``pitch`` is low or high, ``f0`` in Hz, ``score`` the similarity in 0..1."""

    timbre: str
    pitch: str
    f0: float
    score: float


# --- picture ------------------------------------------------------------------------------------------------------


def read_objects(video: np.ndarray | Picture, fps: float) -> list[SeenObject]:
    """Objects of a clip [T, H, W, 3], the largest first, at most two."""
    picture = Picture.of(video)
    found = []
    for colour in picture.colours:
        track = picture.track(colour)
        motion = read_motion(picture.frames, track, fps)
        shape, size = read_shape(track, turned=motion == "swings")
        found.append(SeenObject(colour, shape, read_side(track), size, motion))
    return found


def read_side(track: Track) -> str:
    """Third of the frame in which the object is on average; frames where it is well seen count."""
    weight = np.clip(track.area / max(float(np.quantile(track.area, 0.9)), 1e-9), 0.0, 1.0) ** 2
    height, width = track.coverage.shape[1:]
    x = float((weight * track.x).sum() / max(weight.sum(), 1e-9)) * max(height, width) / width
    return SIDES[min(2, max(0, int(3 * x)))]


def read_shape(track: Track, *, turned: bool = False) -> tuple[str, str]:
    """Nearest silhouette, in the metric of shape_metric.py, and size (small or large).

    ``turned`` allows rotations, as of a pendulum.
    """
    residuals = residuals_of(track, turned=turned)
    radii, _ = _silhouettes(turned)
    far = distances(residuals.reshape(-1, residuals.shape[-1])).reshape(len(SHAPES), len(radii), -1)
    best, k, _ = np.unravel_index(int(far.argmin()), far.shape)
    radius = float(radii[k])
    middle = 0.5 * (RADII["small"] * 1.05 + RADII["large"] * 0.95)
    return SHAPES[best], "small" if radius < middle else "large"


def residuals_of(track: Track, *, turned: bool) -> np.ndarray:
    """What each silhouette leaves of the object, averaged over frames in which it is well seen.

    Returns:
        [shapes, radii * blurs, _GRID * _GRID]. Each frame has its own angle; shape, radius and blur are those of all.
    """
    masks = _aligned_masks(track)
    _, templates = _silhouettes(turned)
    weight = np.clip(track.area / max(float(np.quantile(track.area, 0.9)), 1e-9), 0.0, 1.0) ** 4
    weight = weight / max(float(weight.sum()), 1e-9)
    flat = templates.reshape(-1, *templates.shape[-2:])  # [hypotheses, angles, pixels]
    angles = np.einsum("tp,hap->hta", masks, flat, optimize=True).argmax(axis=-1)
    chosen = np.zeros((len(flat), flat.shape[1]))  # how much of the weight each angle has
    np.add.at(chosen, (np.arange(len(flat))[:, None], angles), weight)
    mean = weight @ masks - np.einsum("ha,hap->hp", chosen, flat, optimize=True)
    return np.asarray(mean.reshape(len(SHAPES), -1, masks.shape[-1]), dtype=np.float32)


def _offsets() -> np.ndarray:
    return np.linspace(-_REACH, _REACH, _GRID)


def _aligned_masks(track: Track) -> np.ndarray:
    """Coverage around the centroid of every frame, bilinear, unit norm: [T, _GRID * _GRID]."""
    count, height, width = track.coverage.shape
    side = max(height, width)
    offsets = _offsets() * side
    rows = np.clip(track.y[:, None] * side - 0.5 + offsets, 0, height - 1.001)
    columns = np.clip(track.x[:, None] * side - 0.5 + offsets, 0, width - 1.001)
    i, j = np.floor(rows).astype(int), np.floor(columns).astype(int)
    u, v = (rows - i)[:, :, None], (columns - j)[:, None, :]
    t = np.arange(count)[:, None, None]
    i, j = i[:, :, None], j[:, None, :]
    c = track.shares
    i1, j1 = np.minimum(i + 1, height - 1), np.minimum(j + 1, width - 1)
    masks = (1 - u) * ((1 - v) * c[t, i, j] + v * c[t, i, j1]) + u * ((1 - v) * c[t, i1, j] + v * c[t, i1, j1])
    flat = masks.reshape(count, -1)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6))


@lru_cache(maxsize=2)
def _silhouettes(turned: bool) -> tuple[np.ndarray, np.ndarray]:
    """Radii [R] and templates [shapes, R, blurs, angles, _GRID * _GRID] of unit norm."""
    radii = np.linspace(RADII["small"] * 0.9, RADII["large"] * 1.1, 9)
    angles = np.radians([-20, -10, 0, 10, 20]) if turned else np.zeros(1)
    fine = np.linspace(-_REACH, _REACH, 4 * (_GRID - 1) + 1).astype(np.float32)
    x, y = fine[None, :] + 0 * fine[:, None], fine[:, None] + 0 * fine[None, :]
    templates = np.zeros((len(SHAPES), len(radii), len(_BLURS), len(angles), _GRID * _GRID))
    for s, shape in enumerate(SHAPES):
        for r, radius in enumerate(radii):
            inside = signed_distance(shape, x, y, radius) < 0
            centre = float((inside.sum(axis=1) @ fine) / inside.sum())  # of mass, where the track follows it
            for a, angle in enumerate(angles):
                u, v = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
                sharp = (
                    signed_distance(shape, u.astype(np.float32), (v + centre).astype(np.float32), radius) < 0
                ) * 1.0
                for b, blur in enumerate(_BLURS):
                    taps = np.exp(-0.5 * (fine[:, None] - fine[None, ::4]) ** 2 / (blur / 64) ** 2)
                    soft = taps.T @ sharp @ taps
                    templates[s, r, b, a] = (soft / np.linalg.norm(soft)).ravel()
    return radii, templates


# --- sound --------------------------------------------------------------------------------------------------------


def read_sources(
    audio: np.ndarray | Sound, sample_rate: int, clauses: Sequence[Mapping[str, Any]]
) -> list[HeardSource | None]:
    """Timbre and pitch class of each clause's sound; None for what is silent or was not heard.

    With one audible clause all sounds of the clip are read, whatever the clause says. With two the clauses tell which
    onset belongs to which source, and the class is then read from the onsets' spectra without them.
    """
    sound = Sound.of(audio, sample_rate)
    onsets = source_onsets(sound, sample_rate, clauses)
    times = [event.time for event in onsets]
    found: list[HeardSource | None] = []
    for index, clause in enumerate(clauses):
        own = [event.time for event in onsets if event.source == index]
        found.append(read_sound(sound, sample_rate, own, times) if clause.get("audible", True) and own else None)
    return found


def read_sound(
    audio: np.ndarray | Sound, sample_rate: int, onsets: Sequence[float], others: Sequence[float] = ()
) -> HeardSource | None:
    """Class of the sound that starts at ``onsets`` (s): nearest of the world's timbres, sizes and pitches.

    ``others`` are the starts of all sounds; what comes after the next one is not looked at.
    """
    magnitude = Sound.of(audio, sample_rate).banded
    classes, pitches, templates = _patches(sample_rate)
    total = np.zeros(len(classes))
    for onset in onsets:
        next_one = min((t for t in others if t > onset + 0.06), default=np.inf)
        steps = int(min(_PATCH_STEPS, max(6, (next_one - 0.016 - onset) // _PATCH_STEP_S)))
        patch = _patch(magnitude, onset, steps)
        norm = np.linalg.norm(patch)
        if norm < 1e-6:
            continue
        parts = templates[:, :steps]
        similar = np.einsum("sb,ksb->k", patch, parts) / np.maximum(np.linalg.norm(parts, axis=(1, 2)), 1e-9) / norm
        total += similar
    if not total.any():
        return None
    best = int(total.argmax())
    timbre, size = classes[best]
    score = float(total[best] / len(onsets))
    return HeardSource(timbre, "low" if size == "large" else "high", float(pitches[best]), score)


def _patch(magnitude: np.ndarray, onset: float, steps: int) -> np.ndarray:
    """Spectra after an onset less what sounded before it, compressed: [steps, BANDS]."""
    first = onset + 0.012
    index = np.clip(np.round((first + _PATCH_STEP_S * np.arange(steps)) / HOP).astype(int), 0, len(magnitude) - 1)
    before = magnitude[int(np.clip(round((onset - 0.020) / HOP), 0, len(magnitude) - 1))]
    fading = np.exp(-_PATCH_STEP_S * np.arange(steps) / 0.08)[:, None]
    return np.sqrt(np.maximum(magnitude[index] - before * fading, 0.0))


@lru_cache(maxsize=4)
def _patches(sample_rate: int) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
    """Class (timbre, size), fundamental [K] and patch [K, steps, BANDS] of every template."""
    classes, pitches, patches = [], [], []
    silence = np.zeros(round(0.05 * sample_rate))
    for timbre, sizes in PITCHES.items():
        for size, nominal in sizes.items():
            for shift in _SEMITONES:
                pitch = float(nominal * 2 ** (shift / 12))
                tone = modal_tone(timbre, pitch, sample_rate).astype(np.float64)
                magnitude = Sound(np.concatenate([silence, tone]), sample_rate).banded
                classes.append((timbre, size))
                pitches.append(pitch)
                patches.append(_patch(magnitude, len(silence) / sample_rate, _PATCH_STEPS))
    return classes, np.array(pitches), np.stack(patches)


# --- against a caption --------------------------------------------------------------------------------------------


def check_attributes(
    video: np.ndarray | Picture,
    audio: np.ndarray | Sound,
    fps: float,
    sample_rate: int,
    clauses: Sequence[Mapping[str, Any]],
) -> list[dict[str, bool]]:
    """Which described attributes the clip really has.

    Args:
        video: uint8 [T, H, W, 3]. audio: float [N]. fps: frames per second. sample_rate: Hz.
        clauses: attributes as ``parse_prompt`` gives them; None leaves one open, and it is not checked.

    Returns:
        For each clause a dict from attribute (``SEEN`` and ``HEARD``) to whether the clip has it. An object or sound
        that was not found has none of them. Two objects are paired with two clauses so that most attributes fit.
    """
    objects = read_objects(video, fps)
    sounds = read_sources(audio, sample_rate, clauses)
    seen = [index for index, clause in enumerate(clauses) if clause.get("visible", True)]
    places: list[SeenObject | None] = [*objects, *([None] * len(seen))]
    options = [
        {index: _compare(clauses[index], thing) for index, thing in zip(seen, chosen, strict=False)}
        for chosen in itertools.permutations(places, len(seen))
    ]
    best = max(options, key=lambda option: sum(sum(checks.values()) for checks in option.values()))
    result = []
    for index, clause in enumerate(clauses):
        checks = dict(best.get(index, {}))
        if clause.get("audible", True):
            sound = sounds[index]
            timbre = timbre_of(clause)
            if timbre is not None:
                checks["timbre"] = sound is not None and sound.timbre == timbre
            if clause.get("size") is not None:
                checks["pitch"] = sound is not None and sound.pitch == ("low" if clause["size"] == "large" else "high")
        result.append(checks)
    return result


def _compare(clause: Mapping[str, Any], thing: SeenObject | None) -> dict[str, bool]:
    told = [name for name in SEEN if clause.get(name) is not None]
    return {name: thing is not None and getattr(thing, name) == clause[name] for name in told}
