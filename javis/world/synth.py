"""Sounds: modal synthesis of struck things (decaying sinusoids and a noise burst) and gated electronic beeps.

Struck-object modes after the usual modal model (van den Doel and Pai, "The Sounds of Physical Shapes", 1998):
x(t) = sum_k a_k exp(-t / tau_k) sin(2 pi f_k t), loudness from the speed of the impact. Sounds end within
``SOUND_SECONDS``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from javis.world.scene import Scene, Source

SOUND_SECONDS = 0.35
PEAK = 0.45  # of one sound at strength 1; two sources and their tails stay below 1
QUIETEST = 0.35  # gain at strength 0
BEEP_SECONDS = 0.13


class Partial(NamedTuple):
    """One mode: frequency over the fundamental, amplitude, decay time in seconds."""

    ratio: float
    amplitude: float
    tau: float


# Inharmonic ratios for what is struck, harmonics for the beep (its decay is that of the gate). They keep the strong
# partials of each class away from the fundamentals of most others, so that two sources can be told apart.
TIMBRE_PARTIALS: dict[str, tuple[Partial, ...]] = {
    "wooden": (Partial(1.0, 1.0, 0.045), Partial(2.10, 0.30, 0.022)),
    "metal": (Partial(1.0, 1.0, 0.095), Partial(2.76, 0.65, 0.075), Partial(4.50, 0.35, 0.050)),
    "glass": (Partial(1.0, 1.0, 0.070), Partial(2.32, 0.45, 0.045), Partial(3.37, 0.15, 0.030)),
    "electronic": (Partial(1.0, 1.0, 0.0), Partial(2.0, 0.45, 0.0), Partial(3.0, 0.18, 0.0), Partial(4.0, 0.12, 0.0)),
}
PITCHES: dict[str, dict[str, float]] = {
    "wooden": {"large": 260.0, "small": 470.0},
    "metal": {"large": 370.0, "small": 660.0},
    "electronic": {"large": 440.0, "small": 800.0},
    "glass": {"large": 1250.0, "small": 2150.0},
}
SHAPE_SEMITONES = {"ball": -0.9, "box": -0.3, "triangle": 0.3, "star": 0.9, "bell": 0.0}
JITTER_SEMITONES = 0.4
# Noise burst: amplitude, decay in seconds, and width of the moving average that dulls it (1 = bright).
_BURSTS: dict[str, tuple[float, float, int]] = {
    "wooden": (0.40, 0.006, 6),
    "metal": (0.22, 0.003, 1),
    "glass": (0.15, 0.002, 1),
}


def draw_pitch(timbre: str, size: str, shape: str, rng: np.random.Generator) -> float:
    """Fundamental in Hz: small is high, large is low, at least 7 semitones apart; the shape shifts it a little."""
    shift = SHAPE_SEMITONES[shape] + rng.uniform(-JITTER_SEMITONES, JITTER_SEMITONES)
    return float(PITCHES[timbre][size] * 2 ** (shift / 12))


def gain(strength: float) -> float:
    """Loudness of an event: linear in its strength, so in the impact speed."""
    return QUIETEST + (1 - QUIETEST) * strength


def modal_tone(timbre: str, f0: float, sample_rate: int) -> NDArray[np.float32]:
    """The tone of one event at peak 1, without noise burst; float32 [round(SOUND_SECONDS * sample_rate)]."""
    n = round(SOUND_SECONDS * sample_rate)
    t = np.arange(n, dtype=np.float32) / np.float32(sample_rate)
    tone: NDArray[np.float32] = np.zeros(n, dtype=np.float32)
    for ratio, amplitude, tau in TIMBRE_PARTIALS[timbre]:
        frequency = ratio * f0
        if frequency > 0.47 * sample_rate:
            continue
        wave = np.sin(np.float32(2 * math.pi * frequency) * t)
        tone += np.float32(amplitude) * (wave * np.exp(t * np.float32(-1 / tau)) if tau else wave)
    if timbre == "electronic":
        tone *= np.clip(t / 0.003, 0, 1) * np.clip((BEEP_SECONDS - t) / 0.012, 0, 1)
    else:
        tone *= np.clip((SOUND_SECONDS - t) / 0.1, 0, 1)
    return tone / np.abs(tone).max()


def _burst(source: Source, sample_rate: int, rng: np.random.Generator) -> NDArray[np.float32]:
    amplitude, tau, width = _BURSTS[source.timbre or ""]
    if source.motion == "knocks":
        amplitude *= 1.5
    n = round(8 * tau * sample_rate)
    noise = rng.standard_normal(n + width - 1, dtype=np.float32)
    if width > 1:
        noise = np.convolve(noise, np.full(width, width**-0.5, dtype=np.float32), mode="valid")
    envelope = np.exp(np.arange(n, dtype=np.float32) * np.float32(-1 / (tau * sample_rate)))
    return np.clip(noise, -2, 2) * envelope * np.float32(0.5 * amplitude)


def render_audio(scene: Scene) -> NDArray[np.float32]:
    """Waveform of a scene, mono float32 [round(seconds * sample_rate)], |x| <= 1; exactly 0 where nothing sounds.

    A sound starts on the sample nearest to its event time.
    """
    rate, total = scene.config.sample_rate, scene.config.samples
    out: NDArray[np.float32] = np.zeros(total, dtype=np.float32)
    for index, source in enumerate(scene.sources):
        if not source.events or source.timbre is None or source.f0 is None:
            continue
        rng = np.random.Generator(np.random.PCG64([scene.seed, 5, index]))
        tone = modal_tone(source.timbre, source.f0, rate) * np.float32(PEAK * 0.8)
        for event in source.events:
            sound = tone.copy()
            if source.timbre in _BURSTS:
                burst = _burst(source, rate, rng)
                sound[: len(burst)] += np.float32(PEAK * 0.8) * burst[: len(sound)]
            start = round(event.time * rate)
            stop = min(total, start + len(sound))
            out[start:stop] += np.float32(gain(event.strength)) * sound[: stop - start]
    return np.clip(out, -1.0, 1.0)
