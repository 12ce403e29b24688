"""Clips on disk: lengths, alignment, colours, scaling, and nothing half-written."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from javis.errors import UsageError
from javis.media import AAC_SAMPLE_RATES, atomic_file, exact_rate, read_clip, samples_for, write_clip, write_text

from .conftest import files


def counted_frames(frames: int, size: int = 32) -> np.ndarray:
    """uint8 [T,H,W,3]: frame i is a flat grey of its own, so that a lost or doubled frame shows."""
    levels = (40 + 6 * (np.arange(frames) % 32)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, size, size, 3)).copy()


def clicks(samples: int, sample_rate: int, at: list[int]) -> np.ndarray:
    """Decaying 900 Hz bursts that begin at the given samples, float32 [N]."""
    audio = np.zeros(samples, np.float32)
    time = np.arange(sample_rate // 10) / sample_rate
    burst = (0.6 * np.sin(2 * np.pi * 900 * time) * np.exp(-40 * time)).astype(np.float32)
    for start in at:
        piece = audio[start : start + len(burst)]
        piece += burst[: len(piece)]
    return audio


def boxes(data: bytes, path: list[bytes]) -> list[bytes]:
    """Payloads of the mp4 boxes at ``path`` (ISO/IEC 14496-12), read without the library that wrote them."""
    found, start = [], 0
    while start + 8 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == path[0]:
            payload = data[start + 8 : start + size]
            found += boxes(payload, path[1:]) if path[1:] else [payload]
        start += size
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=st.integers(1, 60),
    fps=st.sampled_from([8, 10, 12, 12.5, 15, 16, 23.976, 24, 25, 29.97, 30, 50, 60]),
    sample_rate=st.sampled_from([8000, 16000, 22050, 44100, 48000]),
)
def test_both_streams_start_at_zero_and_last_equally_long(
    tmp_path: Path, frames: int, fps: float, sample_rate: int
) -> None:
    samples = samples_for(frames, fps, sample_rate)
    path = tmp_path / "clip.mp4"
    write_clip(path, counted_frames(frames), clicks(samples, sample_rate, [0]), fps, sample_rate)
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert video.codec_context.pix_fmt == "yuv420p"
        assert video.start_time == 0
        assert audio.start_time == 0
        assert video.duration * video.time_base == frames / exact_rate(fps)
        assert audio.duration * audio.time_base == Fraction(samples, sample_rate)
        assert abs(video.duration * video.time_base - audio.duration * audio.time_base) < Fraction(1, sample_rate)
        packets = [packet for packet in container.demux(video) if packet.pts is not None]
        assert [p.pts * p.time_base for p in packets] == [i / exact_rate(fps) for i in range(frames)]
    clip = read_clip(path)
    assert clip.video.shape == (frames, 32, 32, 3)
    assert clip.audio.shape == (samples,)
    assert clip.sample_rate == sample_rate
    assert exact_rate(clip.fps) == exact_rate(fps)


def test_the_edit_lists_hold_the_lengths_without_rounding(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(path, counted_frames(51), clicks(34000, 16000, [0]), 24, 16000)
    data = path.read_bytes()
    (header,) = boxes(data, [b"moov", b"mvhd"])
    clock = int.from_bytes(header[12:16], "big")
    lists = boxes(data, [b"moov", b"trak", b"edts", b"elst"])
    assert len(lists) == 2
    spans = [Fraction(int.from_bytes(entry[8:12], "big"), clock) for entry in lists]
    assert spans == [Fraction(51, 24), Fraction(34000, 16000)]
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first for players that stream"


def test_sound_comes_back_at_the_same_sample(tmp_path: Path) -> None:
    """An encoder delay that is not cut off would show as a shift of 1,024 samples."""
    audio = clicks(32000, 16000, [0, 7001, 20000, 31000])
    write_clip(tmp_path / "clip.mp4", counted_frames(32), audio, 16, 16000)
    decoded = read_clip(tmp_path / "clip.mp4").audio
    spectrum = np.fft.rfft(decoded) * np.conj(np.fft.rfft(audio))
    shift = int(np.argmax(np.fft.irfft(spectrum)))
    assert shift == 0
    assert np.sqrt(np.mean((decoded - audio) ** 2)) < 0.05 * np.sqrt(np.mean(audio**2))


def test_frames_keep_their_order_and_colours(tmp_path: Path) -> None:
    video = counted_frames(32)
    video[:, :16, :, :] = [200, 30, 40]
    write_clip(tmp_path / "clip.mp4", video, np.zeros(32000), 16, 16000)
    decoded = read_clip(tmp_path / "clip.mp4").video.astype(int)
    away_from_edge = np.r_[0:12, 20:32]
    difference = np.abs(decoded - video)[:, away_from_edge]
    assert difference.max() <= 5, "8-bit BT.709 at limited range is within a few levels; the wrong matrix is not"


@pytest.mark.parametrize("size", [(128, 128), (96, 192), (512, 512)])
def test_scaling_is_smooth_and_does_not_shift(tmp_path: Path, size: tuple[int, int]) -> None:
    """A Gaussian blob keeps its centre (in units of the frame) and does not become blocks."""
    y, x = np.mgrid[0:64, 0:64] + 0.5
    blob = 200 * np.exp(-((x - 22.3) ** 2 + (y - 41.6) ** 2) / (2 * 5.0**2)) + 20
    video = np.repeat(np.repeat(blob[None, ..., None], 8, 0), 3, -1).astype(np.uint8)
    write_clip(tmp_path / "clip.mp4", video, np.zeros(8000), 16, 16000, scale_to=size, quality=1)
    image = read_clip(tmp_path / "clip.mp4").video[4, :, :, 1].astype(float)
    assert image.shape == size
    weight = np.maximum(image - 30, 0)
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    centre = (weight * columns).sum() / weight.sum() / size[1], (weight * rows).sum() / weight.sum() / size[0]
    assert centre == pytest.approx((22.3 / 64, 41.6 / 64), abs=0.2 / 64)
    expected = 200 * np.exp(-((columns * 64 / size[1] - 22.3) ** 2 + (rows * 64 / size[0] - 41.6) ** 2) / (2 * 5.0**2))
    assert np.abs(image - expected - 20).max() < 8, "nearest-neighbour scaling would be off by about 20 on the slopes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": np.zeros((0, 32, 32, 3), np.uint8)}, "T > 0"),
        ({"video": np.zeros((32, 32, 32, 3), np.float32)}, "uint8"),
        ({"audio": np.zeros(31998, np.float32)}, "cut or pad it to 32000"),
        ({"audio": np.zeros((32000, 1), np.float32)}, r"float \[N\]"),
        ({"audio": np.full(32000, np.nan, np.float32)}, "not finite"),
        ({"sample_rate": 16001}, "does not exist in AAC"),
        ({"fps": float("nan")}, "frame rate"),
        ({"fps": 0.0}, "frame rate"),
        ({"video": np.zeros((32, 33, 32, 3), np.uint8)}, "even numbers"),
        ({"scale_to": (0, 64)}, "even numbers"),
        ({"scale_to": (63, 64)}, "even numbers"),
    ],
)
def test_unusable_clips_are_refused_and_leave_nothing(tmp_path: Path, change: dict[str, object], message: str) -> None:
    arguments = {"video": counted_frames(32), "audio": np.zeros(32000, np.float32), "fps": 16, "sample_rate": 16000}
    with pytest.raises(UsageError, match=message):
        write_clip(tmp_path / "clip.mp4", **(arguments | change))  # type: ignore[arg-type]
    assert files(tmp_path) == set()


def test_a_failure_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "notes.json"
    write_text(path, "old")

    def interrupted() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert files(tmp_path) == {"a/notes.json"}


@pytest.mark.parametrize("name", [".", "folder", "file/below.mp4", "x" * 300 + ".mp4"])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="folder|cannot write"):
        write_text(tmp_path / name, "text")
    assert files(tmp_path) == {"file"}


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "{}")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("content", [b"", b"not a video", bytes(range(256)) * 20])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read"):
        read_clip(path)
    with pytest.raises(UsageError, match="no such file"):
        read_clip(tmp_path / "other.mp4")


@given(frames=st.integers(1, 10_000), fps=st.floats(1, 240), sample_rate=st.sampled_from(AAC_SAMPLE_RATES))
def test_samples_last_as_long_as_frames(frames: int, fps: float, sample_rate: int) -> None:
    exact = Fraction(frames * sample_rate) / exact_rate(fps)
    assert abs(samples_for(frames, fps, sample_rate) - exact) <= Fraction(1, 2)
    assert abs(float(exact_rate(fps)) - fps) <= 1.1e-3


def test_broadcast_rates_are_exact() -> None:
    assert exact_rate(23.976) == Fraction(24000, 1001)
    assert exact_rate(29.97) == Fraction(30000, 1001)
    assert exact_rate(16) == 16
    assert exact_rate(12.5) == Fraction(25, 2)
