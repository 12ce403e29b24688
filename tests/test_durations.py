"""Lengths and sizes: exact at any frame rate, and refused in one line where there are none."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from javis.durations import clip_length
from javis.errors import UsageError
from javis.frame_size import FrameSize, frame_size
from javis.media import read_clip, write_clip

RATES = st.one_of(st.integers(8, 60), st.floats(8, 60), st.sampled_from([23.976, 24000 / 1001, 29.97, 59.94, 12.5]))


@settings(max_examples=300, deadline=None)
@given(fps=RATES, seconds=st.floats(0.05, 20))
def test_frames_and_samples_are_those_nearest_to_what_was_asked_for(fps: float, seconds: float) -> None:
    length = clip_length(seconds, fps, 16000, window=17)
    assert length.frames == max(1, round(seconds * fps))
    # 1e-3: 23.976 stands for 24000/1001, and other rates are rounded to thousandths at most.
    assert length.samples == pytest.approx(length.frames / fps * 16000, abs=0.5 + 1e-3 * seconds * 16000 / fps)
    assert abs(length.samples / 16000 - length.seconds) <= 0.5 / 16000 + 1e-9
    assert length.model_frames % 17 == 0 and 0 <= length.model_frames - length.frames < 17
    assert length.model_samples >= length.samples
    if length.frames % 17 == 0:
        assert (length.model_frames, length.model_samples) == (length.frames, length.samples)


@pytest.mark.parametrize("fps", [8, 10, 12.5, 16, 23.976, 24, 25, 29.97, 30, 48, 50, 59.94, 60])
def test_two_seconds_are_two_seconds(fps: float) -> None:
    length = clip_length(2, fps, 16000, window=17)
    assert length.frames == round(2 * fps)
    if float(fps).is_integer():
        assert (length.samples, length.seconds) == (32000, 2.0)
    assert isinstance(length.fps, int) == float(fps).is_integer()


def test_the_official_clip() -> None:
    """51 frames at 24 a second: three windows, 2.125 s of sound."""
    length = clip_length(2.125, 24, 16000, window=17)
    assert (length.frames, length.model_frames, length.samples) == (51, 51, 34000)
    assert clip_length(2, 24, 16000, window=17).model_frames == 51


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, -math.inf, "2", None, True])
def test_seconds_that_are_none(seconds: Any) -> None:
    with pytest.raises(UsageError, match=r"seconds must be above 0 and at most 60, got") as caught:
        clip_length(seconds, 24, 16000, limits=(0, 60))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fps", [0, -24, 0.5, 121, math.nan, math.inf, "24", True])
def test_rates_that_are_none(fps: Any) -> None:
    with pytest.raises(UsageError, match="fps must be between 1 and 120, got"):
        clip_length(2, fps, 16000)


def streams_of(path: Path) -> dict[str, tuple[Fraction, Fraction]]:
    """Kind of stream -> (start, duration) in seconds, as the file states them."""
    with av.open(str(path)) as container:
        return {
            s.type: (Fraction(s.start_time or 0) * s.time_base, Fraction(s.duration) * s.time_base)
            for s in container.streams
        }


def check_muxed(path: Path, fps: float, seconds: float) -> None:
    length = clip_length(seconds, fps, 16000, window=17)
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (length.frames, 16, 16, 3), dtype=np.uint8)
    write_clip(path, video, rng.uniform(-0.1, 0.1, length.samples), fps, 16000)
    streams = streams_of(path)
    assert set(streams) == {"video", "audio"}
    for start, duration in streams.values():
        assert start == 0
        # Both are stated to within a tick of their clocks, far less than a packet of AAC (1024 samples).
        assert abs(float(duration) - length.frames / fps) < min(2e-3, 1024 / 16000)
    back = read_clip(path)
    assert (len(back.video), len(back.audio)) == (length.frames, length.samples)
    assert back.fps == pytest.approx(fps, rel=1e-4)


@pytest.mark.parametrize("fps", [8, 23.976, 24, 29.97, 60])
def test_both_streams_start_at_0_and_last_equally_long(tmp_path: Path, fps: float) -> None:
    check_muxed(tmp_path / "clip.mp4", fps, 2)


@settings(max_examples=10, deadline=None)
@given(fps=st.floats(8, 60), seconds=st.floats(0.1, 4.5))
def test_so_they_do_at_any_rate(tmp_path_factory: pytest.TempPathFactory, fps: float, seconds: float) -> None:
    check_muxed(tmp_path_factory.mktemp("clip") / "clip.mp4", fps, seconds)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "ratio", "size"),
    [
        ("240p", "9:16", (240, 426)),
        ("240p", "1:1", (320, 320)),
        ("720p", "9:16", (720, 1280)),
        ("720p", "16:9", (1280, 720)),
        ("512", "1:1", (512, 512)),
        ("512x288", "9:16", (288, 512)),
        (" 64x64 ", "9:16", (64, 64)),
    ],
)
def test_sizes(resolution: str, ratio: str, size: tuple[int, int]) -> None:
    assert frame_size(resolution, ratio) == size
    assert str(FrameSize(288, 512)) == "512x288"


@pytest.mark.parametrize(
    ("resolution", "ratio", "message"),
    [
        ("big", "9:16", "unknown resolution 'big'; expected one of 144p, 240p,.* or WIDTHxHEIGHT such as 512x512"),
        ("", "9:16", "unknown resolution"),
        ("0x0", "9:16", "sides from 16 to 4096"),
        ("99999x16", "9:16", "sides from 16 to 4096"),
        ("426x240", "9:16", "multiples of 8 pixels; the nearest is 424x240"),
        ("-8x8", "9:16", "unknown resolution"),
        ("240p", "7:5", "no size for the ratio '7:5'"),
        ("512", "9:16", "no size for the ratio '9:16'"),
        ("x" * 500, "9:16", "unknown resolution"),
    ],
)
def test_sizes_that_are_none(resolution: str, ratio: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        frame_size(resolution, ratio)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
