"""Clips on disk: mp4 with picture and sound of exactly the same length, and the contact sheet that shows both.

Read in this order: `atomic_file`, `write_clip`, `read_clip`. The contact sheet is in `javis/contact_sheet.py`.

An AAC encoder puts 1,024 priming samples before the sound and fills its last packet up with zeros. The mp4 edit list
and the packet durations say so, and players cut both off; `read_clip` does the same. With the movie time scale set to a
common multiple of the frame rate and the sample rate both lengths are stored exactly.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import secrets
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from javis.errors import FailedError, UsageError

if TYPE_CHECKING:
    import av

AAC_SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_AAC_FRAME = 1024  # samples in an AAC-LC packet (ISO/IEC 14496-3)


class Clip(NamedTuple):
    """A decoded clip. ``video`` is uint8 [T,H,W,3] (sRGB), ``audio`` float32 [N] in [-1, 1]."""

    video: np.ndarray
    audio: np.ndarray
    fps: float
    sample_rate: int


def exact_rate(fps: float) -> Fraction:
    """The frame rate as a fraction: 16 -> 16, 23.976 -> 24000/1001. Raises `UsageError` outside (0, 1000]."""
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise UsageError(f"frame rate {fps} is unusable; expected a number above 0 and at most 1000")
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if abs(float(ntsc) - fps) < 1e-3 and not float(fps).is_integer():
        return ntsc
    return Fraction(fps).limit_denominator(1000)


def samples_for(frames: int, fps: float, sample_rate: int) -> int:
    """Number of audio samples that lasts as long as ``frames`` frames, rounded to the nearest (ties up)."""
    return math.floor(Fraction(frames * sample_rate) / exact_rate(fps) + Fraction(1, 2))


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it becomes ``path`` on success and is removed on any failure.

    The temporary name keeps the suffix (writers choose the format by it), begins with a dot and tells who writes it
    (`remove_leftovers`). Missing parent folders are made. Raises `UsageError` if ``path`` cannot be written (a folder,
    or below something that is not writable).
    """
    target = Path(path)
    temporary = _touch_beside(target)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # gone after the replace; after a failure it must not stay behind
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, all or nothing."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise `UsageError` unless a file can be made at ``path``; leaves no file behind (folders made stay)."""
    _touch_beside(Path(path)).unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of `atomic_file` in ``folder`` whose process died on this machine before it was done."""
    for path in folder.glob(".*.part.*"):
        found = _TEMPORARY.search(path.name)
        if found and found["machine"] == _machine() and not _runs(int(found["pid"])):
            path.unlink(missing_ok=True)


_TEMPORARY = re.compile(r"\.(?P<machine>[a-z0-9-]+)-(?P<pid>\d{1,10})\.[0-9a-f]{8}\.part\.\w+$")


def _machine() -> str:
    return re.sub(r"[^a-z0-9]+", "-", platform.node().lower())[:30] or "machine"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # it runs, and is another user's; or nobody can tell
    return True


def _touch_beside(target: Path) -> Path:
    """Make an empty temporary file in the folder of ``target``, or say why ``target`` cannot be written."""
    try:
        if target.is_dir():
            raise UsageError(f"output {target} is a folder; give the name of a file")
        writer = f"{_machine()}-{os.getpid()}"
        temporary = target.with_name(f".{target.stem[:40]}.{writer}.{secrets.token_hex(4)}.part{target.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot write {target}: {reason}; choose a place that can be written") from None
    return temporary


def _check_clip(video: np.ndarray, audio: np.ndarray, fps: float, sample_rate: int) -> None:
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UsageError(f"video must be uint8 [T,H,W,3] with T > 0, got {video.dtype} {list(video.shape)}")
    if not np.issubdtype(audio.dtype, np.floating) or audio.ndim != 1:
        raise UsageError(f"audio must be float [N], got {audio.dtype} {list(audio.shape)}")
    if not np.isfinite(audio).all():
        raise UsageError("audio has values that are not finite; expected samples in [-1, 1]")
    if sample_rate not in AAC_SAMPLE_RATES:
        raise UsageError(f"sample rate {sample_rate} does not exist in AAC; expected one of {AAC_SAMPLE_RATES}")
    exact = Fraction(len(video) * sample_rate) / exact_rate(fps)
    if abs(len(audio) - exact) >= 1:
        raise UsageError(
            f"audio has {len(audio)} samples, but {len(video)} frames at {fps:g} fps last {float(exact):g} samples of "
            f"{sample_rate} Hz; cut or pad it to {samples_for(len(video), fps, sample_rate)}"
        )


def write_clip(
    path: str | os.PathLike[str],
    video: np.ndarray,
    audio: np.ndarray,
    fps: float,
    sample_rate: int,
    *,
    scale_to: tuple[int, int] | None = None,
    quality: int = 16,
) -> None:
    """Write an mp4 (H.264 yuv420p in BT.709 + AAC mono) whose two streams start at 0 and end together.

    Args:
        path: file to write, all or nothing (temporary file in the same folder, then a rename).
        video: uint8 [T,H,W,3], sRGB. Frame i is shown from i/fps on.
        audio: float [N], clipped to [-1, 1]; N must be T/fps seconds to within one sample.
        fps: frames per second. sample_rate: Hz, one that AAC knows.
        scale_to: (height, width) in pixels, both even; frames are scaled with a smooth (Lanczos) kernel.
        quality: the encoder's constant rate factor, 0 (lossless) to 51.

    Raises:
        UsageError: unusable arrays, sizes or path. FailedError: the encoder failed (a full disk, for instance).
    """
    import av

    _check_clip(video, audio, fps, sample_rate)
    rate = exact_rate(fps)
    height, width = scale_to if scale_to is not None else video.shape[1:3]
    if height <= 0 or width <= 0 or height % 2 or width % 2:
        raise UsageError(f"picture size {height}x{width} is unusable in H.264 4:2:0; expected even numbers above 0")

    # A common multiple of both rates as the movie's clock: the edit lists then hold both lengths without rounding.
    clock = math.lcm(rate.numerator, sample_rate)
    options = {"movflags": "+faststart", "movie_timescale": str(clock)}
    with atomic_file(path) as temporary:
        try:
            with av.open(str(temporary), "w", format="mp4", options=options) as container:
                picture = container.add_stream("libx264", rate=rate, options={"crf": str(quality), "bf": "0"})
                picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
                picture.time_base = 1 / rate
                _tag_bt709(picture)
                sound = container.add_stream("aac", rate=sample_rate, layout="mono")
                sound.bit_rate, sound.time_base = 128_000, Fraction(1, sample_rate)
                for index, image in enumerate(video):
                    for packet in picture.encode(_video_frame(image, index, rate, height, width)):
                        container.mux(packet)
                container.mux(list(picture.encode()))
                samples = np.clip(audio, -1, 1).astype(np.float32)[None]
                for start in range(0, samples.shape[1], _AAC_FRAME):
                    chunk = np.ascontiguousarray(samples[:, start : start + _AAC_FRAME])
                    frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
                    frame.sample_rate, frame.pts, frame.time_base = sample_rate, start, Fraction(1, sample_rate)
                    container.mux(list(sound.encode(frame)))
                container.mux(list(sound.encode()))
        except av.error.FFmpegError as error:
            raise FailedError(f"writing {path} failed: {error}") from error


def _tag_bt709(stream: av.VideoStream) -> None:
    """Say in the stream which matrix the colours were made with; players guess by picture size otherwise."""
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709 in ISO/IEC 23091-2
    context.color_range = 1  # limited


def _video_frame(image: np.ndarray, index: int, rate: Fraction, height: int, width: int) -> av.VideoFrame:
    """One RGB image [H,W,3] as a scaled yuv420p frame with its time stamp."""
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame = frame.reformat(
        width=width,
        height=height,
        format="yuv420p",
        interpolation="LANCZOS",
        dst_colorspace="ITU709",
        dst_color_range="MPEG",
    )
    frame.pts, frame.time_base = index, 1 / rate
    return frame


def read_clip(path: str | os.PathLike[str]) -> Clip:
    """Decode the first picture stream and the first sound stream (mixed down to mono) of ``path``.

    The sound is cut to the length its stream states, so the encoder's padding is not in it; a file without sound gives
    an empty array and sample rate 0.

    Raises:
        UsageError: no such file, or not something that can be decoded, or no picture in it.
    """
    import av

    source = Path(path)
    if not source.is_file():
        raise UsageError(f"no such file: {source}; expected a video file")
    images: list[np.ndarray] = []
    pieces: list[np.ndarray] = []
    fps, sample_rate, length = 0.0, 0, None
    try:
        with av.open(str(source)) as container:
            if not container.streams.video:
                raise UsageError(f"{source} has no picture; expected a video file")
            wanted: list[av.VideoStream | av.AudioStream] = [container.streams.video[0], *container.streams.audio[:1]]
            rate = container.streams.video[0].average_rate
            fps = float(rate) if rate else 0.0
            if container.streams.audio:
                stream = container.streams.audio[0]
                sample_rate = stream.rate
                if stream.duration is not None and stream.time_base is not None:
                    length = round(stream.duration * stream.time_base * sample_rate)
            for packet in container.demux(wanted):
                for frame in packet.decode():
                    if isinstance(frame, av.VideoFrame):
                        images.append(frame.to_ndarray(format="rgb24"))
                    elif isinstance(frame, av.AudioFrame):
                        pieces.append(_mono(frame))
    except av.error.FFmpegError as error:
        raise UsageError(f"cannot read {source} as a video: {error}; expected an mp4 or another video file") from None
    if not images:
        raise UsageError(f"{source} has no picture; expected a video file")
    audio = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return Clip(np.stack(images), audio[:length], fps, sample_rate)


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """Samples of a decoded frame as float32 [N]: integers scaled to [-1, 1), channels averaged."""
    values = frame.to_ndarray()
    if np.issubdtype(values.dtype, np.integer):
        values = values / -float(np.iinfo(values.dtype).min) if values.dtype != np.uint8 else (values - 128.0) / 128
    if not frame.format.is_planar:
        values = values.reshape(-1, len(frame.layout.channels)).T
    return np.asarray(values.mean(axis=0), dtype=np.float32)
