"""Clips whose frames and samples say when they are: made for the tests of feeding."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np

from javis.data.manifest import ClipRow, Manifest

LEVELS = 5  # steps of brightness from frame to frame
RAMP = 20.0  # seconds in which the sound rises from 0 to 1


def row(video: Path | str, audio: Path | str, number: int = 0, **changes: object) -> ClipRow:
    """A row with the values of world clips."""
    values: dict[str, object] = {
        "path": str(video), "id": f"clip{number}", "relpath": Path(video).name, "num_frames": 32, "height": 64,
        "width": 64, "aspect_ratio": 1.0, "fps": 16.0, "resolution": 4096, "audio_path": str(audio),
        "audio_fps": 16000, "text": f"caption {number}",
    }  # fmt: skip
    return ClipRow(**values | changes)  # type: ignore[arg-type]


def frames_by_number(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Grey frames uint8 [count, H, W, 3]; `number_of` finds their numbers again."""
    levels = (20 + LEVELS * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def number_of(frames: np.ndarray) -> np.ndarray:
    """Numbers of frames made by `frames_by_number`."""
    return np.round((frames.reshape(len(frames), -1).mean(1) - 20) / LEVELS).astype(int)


def ramp(seconds: float, rate: int) -> np.ndarray:
    """Sound that says what time it is: t / RAMP."""
    return (np.arange(round(seconds * rate)) / rate / RAMP).astype(np.float32)


def write_wav(path: Path, wave: np.ndarray, rate: int, subtype: str = "FLOAT") -> Path:
    import soundfile

    soundfile.write(path, wave, rate, subtype=subtype)
    return path


def write_video(
    path: Path, frames: np.ndarray, times: list[Fraction], codec: str = "libvpx-vp9", *, gop: int = 12,
    tick: Fraction = Fraction(1, 12000), matrix: int = 2,
) -> Path:  # fmt: skip
    """Frames at any times, as ``path`` says (mp4, webm, mkv), with a key frame every ``gop`` frames.

    ``matrix``: 2: BT.601 and nothing said; 1: BT.709 and said so.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format={".mp4": "mp4", ".webm": "webm", ".mkv": "matroska"}[path.suffix]) as container:
        stream = container.add_stream(codec, rate=Fraction(1, 1) / (times[1] - times[0]))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.time_base = stream.codec_context.time_base = tick
        stream.gop_size = gop
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1
        stream.options = {"crf": "4", "lag-in-frames": "0"} if codec.startswith("libvpx") else {"crf": "4"}
        for image, at in zip(frames, times):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            colours = {1: "ITU709", 2: "ITU601"}[matrix]
            frame = frame.reformat(format="yuv420p", dst_colorspace=colours, dst_color_range="MPEG")
            frame.pts, frame.time_base = round(at / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path.write_bytes(buffer.getvalue())
    return path


def regular(count: int, fps: int | Fraction, start: Fraction = Fraction(0)) -> list[Fraction]:
    """Times of ``count`` frames at a constant rate."""
    return [start + Fraction(k) / Fraction(fps) for k in range(count)]


def world_rows(folder: Path, count: int) -> Manifest:
    """The manifest of ``javis.world.make``'s clips in ``folder``."""
    stems = [folder / f"clip_{i:06d}" for i in range(count)]
    return Manifest(tuple(row(f"{stem}.mp4", f"{stem}.wav", i) for i, stem in enumerate(stems)))
