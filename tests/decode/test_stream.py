"""Clips that are written while they are decoded: same file, really side by side, all or nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from javis import media
from javis.decode import DecodeOptions, VideoDecoder, write_decoded
from javis.errors import FailedError, UsageError
from javis.media import read_clip, write_clip, write_frames
from tests.cli.conftest import files
from tests.cli.test_media import clicks, counted_frames

from .codec import latents, make_codec

SOUND = clicks(34000, 16000, [0, 9000])
VIDEO = counted_frames(51)


def in_chunks(video: np.ndarray, size: int = 8) -> Iterator[np.ndarray]:
    for start in range(0, len(video), size):
        yield video[start : start + size]


@pytest.mark.parametrize("scale_to", [None, (64, 64)])
def test_same_file_as_from_all_frames_at_once(tmp_path: Path, scale_to: tuple[int, int] | None) -> None:
    write_clip(tmp_path / "whole.mp4", VIDEO, SOUND, 24, 16000, scale_to=scale_to)
    write_frames(tmp_path / "chunks.mp4", in_chunks(VIDEO), lambda: SOUND, 51, 24, 16000, scale_to=scale_to)
    assert (tmp_path / "chunks.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert files(tmp_path) == {"chunks.mp4", "whole.mp4"}


def test_frames_are_encoded_while_later_ones_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, second_made = threading.Event(), threading.Event()
    original = media._video_frame

    def convert(*args: Any) -> Any:
        assert second_made.wait(30), "the first chunk is encoded before the second one is asked for"
        encoded.set()
        return original(*args)

    def chunks() -> Iterator[np.ndarray]:
        yield VIDEO[:10]
        second_made.set()
        assert encoded.wait(30), "nothing is encoded while a chunk is being made"
        yield VIDEO[10:]

    monkeypatch.setattr(media, "_video_frame", convert)
    write_frames(tmp_path / "clip.mp4", chunks(), SOUND, 51, 24, 16000)


def test_at_most_two_chunks_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, made, original = threading.Event(), [], media._video_frame

    def convert(*args: Any) -> Any:
        assert go.wait(30)
        return original(*args)

    def chunks() -> Iterator[np.ndarray]:
        for chunk in in_chunks(VIDEO, 5):
            made.append(1)
            yield chunk

    monkeypatch.setattr(media, "_video_frame", convert)
    work = threading.Thread(target=write_frames, args=(tmp_path / "c.mp4", chunks(), SOUND, 51, 24, 16000))
    work.start()
    time.sleep(0.3)
    waiting = len(made)
    go.set()
    work.join(30)
    assert 1 <= waiting <= 3  # two that wait, and the one in hand
    assert len(made) == 11


def test_a_failing_decode_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    def chunks() -> Iterator[np.ndarray]:
        yield VIDEO[:10]
        raise FailedError("out of memory")

    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(FailedError, match="out of memory"):
        write_frames(path, chunks(), SOUND, 51, 24, 16000)
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == {"clip.mp4"}


def test_a_failing_encoder_stops_the_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    made = []

    def fail(*_: Any) -> Any:
        raise av.error.OSError(28, "No space left on device", "clip.mp4")

    def chunks() -> Iterator[np.ndarray]:
        for chunk in in_chunks(VIDEO, 3):
            made.append(len(chunk))
            yield chunk

    monkeypatch.setattr(media, "_video_frame", fail)
    with pytest.raises(FailedError, match="writing .*clip.mp4 failed: .*No space left"):
        write_frames(tmp_path / "clip.mp4", chunks(), SOUND, 51, 24, 16000)
    assert len(made) <= 4, "the rest is not decoded for nothing"
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 50}, "got 51 frames"),
        ({"chunks": [VIDEO, VIDEO, VIDEO]}, "got 102 frames or more for a clip of 51"),
        ({"frames": 52, "audio": lambda: clicks(34667, 16000, [0])}, "got 51 frames for a clip of 52"),
        ({"frames": 0}, "at least one frame, got 0"),
        ({"chunks": []}, "got 0 frames"),
        ({"chunks": [VIDEO[:20], VIDEO[20:, :16]]}, "equally large"),
        ({"chunks": [VIDEO[:0]]}, "T > 0"),
        ({"chunks": [VIDEO.astype(np.float32)]}, "uint8"),
        ({"chunks": [VIDEO[:, :31]]}, "even numbers"),
        ({"audio": SOUND[:-2]}, "cut or pad it to 34000"),
        ({"audio": lambda: SOUND[:-2]}, "cut or pad it to 34000"),
        ({"sample_rate": 16001, "audio": lambda: SOUND}, "does not exist in AAC"),
        ({"fps": 0.0, "audio": lambda: SOUND}, "frame rate"),
        ({"scale_to": (63, 64)}, "even numbers"),
    ],
)
def test_unusable_input_leaves_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "chunks": in_chunks(VIDEO), "audio": SOUND if change.get("frames", 51) == 51 else lambda: SOUND, "frames": 51,
        "fps": 24, "sample_rate": 16000,
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        write_frames(tmp_path / "clip.mp4", **(arguments | change))
    assert files(tmp_path) == set()


KILLED = """
import os, sys, time
import numpy as np
from javis.media import write_frames
def chunks():
    yield np.zeros((8, 32, 32, 3), np.uint8)
    yield np.zeros((8, 32, 32, 3), np.uint8)
    time.sleep(0.2)
    print("half", flush=True)
    time.sleep(60)
write_frames(sys.argv[1], chunks(), np.zeros(34000, np.float32), 51, 24, 16000)
"""


def test_a_killed_run_leaves_no_half_clip(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    assert all(name.startswith(".") and ".part" in name for name in files(tmp_path))


def test_from_latents_to_a_file(tmp_path: Path) -> None:
    codec, z = make_codec(torch.float32), latents(20, 4, 4)[0]
    decoder = VideoDecoder(codec, DecodeOptions(frames_at_once=6))
    calls = []

    def sound() -> np.ndarray:
        calls.append(1)
        return clicks(13333, 16000, [0])

    kept = write_decoded(
        tmp_path / "clip.mp4", decoder.stream(z, 20), sound, frames=20, fps=24, sample_rate=16000, quality=1, keep=True
    )
    assert calls == [1]
    assert kept is not None and kept.shape == (20, 32, 32, 3)
    assert np.array_equal(kept, torch.cat(list(decoder.stream(z, 20))).numpy())
    clip = read_clip(tmp_path / "clip.mp4")
    assert clip.video.shape == kept.shape and len(clip.audio) == 13333
    assert write_decoded(
        tmp_path / "clip.mp4", decoder.stream(z, 20), sound, frames=20, fps=24, sample_rate=16000
    ) is None  # fmt: skip
