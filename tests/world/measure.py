"""Measurements on rendered clips that use nothing of the renderer but pixels and samples."""

import numpy as np


def saturation(video: np.ndarray) -> np.ndarray:
    """How coloured each pixel is, float [T, H, W]: ground, props and strings are nearly grey."""
    pixels = video.astype(float)
    return np.clip(pixels.max(-1) - pixels.min(-1) - 14.0, 0.0, None)


def centroids(video: np.ndarray) -> np.ndarray:
    """Centre of the coloured pixels in frame sides, float [T, 2] as (x, y)."""
    weight = saturation(video)
    height, width = weight.shape[1:]
    total = weight.sum((1, 2))
    x = (weight.sum(1) * (np.arange(width) + 0.5)).sum(1) / total / width
    y = (weight.sum(2) * (np.arange(height) + 0.5)).sum(1) / total / height
    return np.stack([x, y], 1)


def sharp_turns(position: np.ndarray, fps: float, least: float) -> list[float]:
    """Times of jumps of the velocity by more than ``least`` (units per second), from positions [T] at i / fps."""
    velocity = np.diff(position) * fps
    jump = np.abs(velocity[2:] - velocity[:-2])  # across the frame interval that holds the contact
    times = []
    for i in np.flatnonzero(jump > least):
        near = jump[max(0, i - 4) : i + 5]
        if jump[i] == near.max():
            times.append((i + 1.5) / fps)
    return times


def onset_near(audio: np.ndarray, rate: int, time: float, reach: float = 0.03) -> float:
    """Instant of the steepest rise of the log energy within ``reach`` of a time, in seconds."""
    span = round(0.004 * rate)
    energy = np.cumsum(np.concatenate([np.zeros(1), audio.astype(float) ** 2]))
    candidates = np.arange(round((time - reach) * rate), round((time + reach) * rate) + 1)
    candidates = candidates[(candidates >= span) & (candidates + span < len(energy))]
    before = energy[candidates] - energy[candidates - span]
    after = energy[candidates + span] - energy[candidates]
    return float(candidates[np.argmax(np.log(after + 1e-4) - np.log(before + 1e-4))] / rate)
