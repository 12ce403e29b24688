"""The contact sheet: one time axis, frames in order, events where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from javis.contact_sheet import contact_sheet, log_mel_picture

from .conftest import files


def centre_of_line(image: np.ndarray, rows: slice, *, blue: bool) -> float:
    """Column of the one bluish (else reddish) vertical line in ``rows``; dashes and blending only weaken it."""
    tint = image[rows, :, 2] - image[rows, :, 0]
    strength = np.maximum((tint if blue else -tint).mean(axis=0) - 0.1, 0)
    lit = np.flatnonzero(strength)
    assert len(lit) and np.ptp(lit) <= 4, "exactly one line"
    return float((strength * np.arange(len(strength))).sum() / strength.sum()) + 0.5


def test_events_stand_at_their_time(tmp_path: Path) -> None:
    video, audio = np.full((32, 64, 64, 3), 90, np.uint8), np.zeros(32000, np.float32)
    path = tmp_path / "sheet.png"
    contact_sheet(path, video, audio, 16, 16000, video_events=[0.55], audio_events=[1.45])
    image = imread(path)
    height, width = image.shape[:2]
    left, right = 0.055 * width, 0.985 * width
    picture, sound = slice(int(0.12 * height), int(0.22 * height)), slice(int(0.45 * height), int(0.65 * height))
    for rows in (picture, sound):  # one axis: the same columns above and below
        seen, heard = (centre_of_line(image, rows, blue=blue) for blue in (True, False))
        assert (seen - left) / (right - left) * 2 == pytest.approx(0.55, abs=0.003)
        assert (heard - left) / (right - left) * 2 == pytest.approx(1.45, abs=0.003)


def test_frames_stand_in_order(tmp_path: Path) -> None:
    video = np.zeros((32, 64, 64, 3), np.uint8)
    video[:, :, :, 0] = (8 * np.arange(32))[:, None, None]
    contact_sheet(tmp_path / "sheet.png", video, np.zeros(32000, np.float32), 16, 16000)
    image = imread(tmp_path / "sheet.png")
    row = image[int(0.2 * image.shape[0]), :, 0] * 255
    middle = [row[int(image.shape[1] * (0.055 + 0.93 * (slot + 0.5) / 16))] for slot in range(16)]
    assert middle == pytest.approx([8 * (2 * slot + 1) for slot in range(16)], abs=1)


@pytest.mark.parametrize(("frames", "samples"), [(1, 1000), (4, 4000), (3, 0)])
def test_short_clips_and_odd_titles(tmp_path: Path, frames: int, samples: int) -> None:
    title = r"$x_ \frac{ {} \u0000 % 红球 " + "word " * 200
    contact_sheet(tmp_path / "s.png", np.zeros((frames, 8, 16, 3), np.uint8), np.zeros(samples), 16, 16000, title=title)
    assert imread(tmp_path / "s.png").shape[1] == 1430
    assert files(tmp_path) == {"s.png"}


def test_log_mel_shows_a_tone_at_its_frequency_and_time() -> None:
    rate = 16000
    audio = np.zeros(2 * rate)
    audio[rate:] = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    levels, edges = log_mel_picture(audio, rate)
    assert levels.shape == (80, 400)
    band = int(levels[:, 300].argmax())
    assert edges[band] < 1000 < edges[band + 2]
    assert levels[:, :190].max() < -60, "silence before the tone"
    assert levels.max() == pytest.approx(0, abs=1e-5)
