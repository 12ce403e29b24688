"""Small media files with known faults."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

FPS, RATE, SIDE, FRAMES = 16, 16000, 32, 32


def pictures(frames: int = FRAMES, seed: int = 0, side: int = SIDE) -> np.ndarray:
    """uint8 [T, H, W, 3], other ones for every seed."""
    ramp = np.linspace(0, 200, side).astype(np.uint8)
    video = np.zeros((frames, side, side, 3), np.uint8)
    for i in range(frames):
        video[i] = np.roll(ramp, i + 3 * seed)[None, :, None]
        video[i, :, :, seed % 3] = 40 * (seed % 5) + i
    return video


def tone(seconds: float = 2.0, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """float32 [samples]."""
    return (0.5 * np.sin(np.arange(round(seconds * rate)) * (0.05 + 0.01 * seed))).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> Path:
    import soundfile

    soundfile.write(path, samples, rate, subtype=subtype, format=path.suffix[1:].upper())
    return path


def write_video(
    path: Path,
    video: np.ndarray,
    sound: np.ndarray | None = None,
    *,
    codec: str = "libx264",
    sound_codec: str = "aac",
    fps: int = FPS,
    rate: int = RATE,
    stamps: Sequence[Fraction] | None = None,  # seconds of each frame; None: even
    sound_start: float = 0.0,
    options: dict[str, str] | None = None,
) -> Path:
    import av

    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        stream.codec_context.time_base = clock = Fraction(1, 16000)
        heard = None
        if sound is not None:
            heard = container.add_stream(sound_codec, rate=rate, layout="mono")
        for i, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            time = Fraction(i, fps) if stamps is None else stamps[i]
            frame.pts, frame.time_base = int(time / clock), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if heard is not None and sound is not None:
            for start in range(0, len(sound), 960):
                chunk = av.AudioFrame.from_ndarray(sound[None, start : start + 960], format="fltp", layout="mono")
                chunk.sample_rate, chunk.time_base = rate, Fraction(1, rate)
                chunk.pts = start + round(sound_start * rate)
                container.mux(heard.encode(chunk))
            container.mux(heard.encode())
    return path


def cut(source: Path, target: Path, share: float) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target
