"""Clips on disk: mp4 with picture and sound of exactly the same length, and the contact sheet that shows both.

Read in this order: `atomic_file`, `write_clip` (`write_frames`: from chunks, while they are made), `read_clip`. The
contact sheet is in `javis/contact_sheet.py`.

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    temporary = hidden_beside(target)
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
    hidden_beside(Path(path)).unlink()


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


def hidden_beside(target: Path) -> Path:
    """Make an empty temporary file in the folder of ``target``; `UsageError` if ``target`` cannot be written."""
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


def _check_video(video: np.ndarray) -> None:
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UsageError(f"video must be uint8 [T,H,W,3] with T > 0, got {video.dtype} {list(video.shape)}")


def _check_rates(fps: float, sample_rate: int) -> Fraction:
    if sample_rate not in AAC_SAMPLE_RATES:
        raise UsageError(f"sample rate {sample_rate} does not exist in AAC; expected one of {AAC_SAMPLE_RATES}")
    return exact_rate(fps)


def _check_audio(audio: np.ndarray, frames: int, fps: float, sample_rate: int) -> None:
    if not np.issubdtype(audio.dtype, np.floating) or audio.ndim != 1:
        raise UsageError(f"audio must be float [N], got {audio.dtype} {list(audio.shape)}")
    if not np.isfinite(audio).all():
        raise UsageError("audio has values that are not finite; expected samples in [-1, 1]")
    exact = Fraction(frames * sample_rate) / _check_rates(fps, sample_rate)
    if abs(len(audio) - exact) >= 1:
        raise UsageError(
            f"audio has {len(audio)} samples, but {frames} frames at {fps:g} fps last {float(exact):g} samples of "
            f"{sample_rate} Hz; cut or pad it to {samples_for(frames, fps, sample_rate)}"
        )


def _check_size(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    if height <= 0 or width <= 0 or height % 2 or width % 2:
        raise UsageError(f"picture size {height}x{width} is unusable in H.264 4:2:0; expected even numbers above 0")
    return height, width


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
    _check_video(video)
    _check_audio(audio, len(video), fps, sample_rate)
    height, width = _check_size(scale_to if scale_to is not None else video.shape[1:3])
    with atomic_file(path) as temporary, _Mp4(temporary, path, height, width, fps, sample_rate, quality) as file:
        file.add_frames(video)
        file.add_audio(audio)


def write_frames(
    path: str | os.PathLike[str],
    chunks: Iterable[np.ndarray],
    audio: np.ndarray | Callable[[], np.ndarray],
    frames: int,
    fps: float,
    sample_rate: int,
    *,
    scale_to: tuple[int, int] | None = None,
    quality: int = 16,
) -> None:
    """`write_clip` for frames that come in ``chunks``: one is encoded, in a thread, while the next ones are made.

    Args:
        path: file to write, all or nothing.
        chunks: uint8 [n,H,W,3] with n > 0, equally large frames, ``frames`` of them in all. At most two chunks wait.
        audio: float [N] or a function that makes it, called after the last chunk has come.
        frames, fps, sample_rate, scale_to, quality: as in `write_clip`.

    Raises:
        UsageError: as in `write_clip`, and chunks that are unusable or hold another number of frames.
        FailedError: the encoder failed. What ``chunks`` or ``audio`` raise goes through; no file is left then.
    """
    if frames < 1:
        raise UsageError(f"a clip has at least one frame, got {frames}")
    if not callable(audio):
        _check_audio(audio, frames, fps, sample_rate)
    else:
        _check_rates(fps, sample_rate)
    size = None if scale_to is None else _check_size(scale_to)
    taken, shape = 0, None
    waiting: deque[Future[None]] = deque()
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(atomic_file(path))
        # Left in reverse: the thread has ended before the file is closed, and the file is closed before it is renamed.
        file = None
        worker = None
        for chunk in chunks:
            _check_video(chunk)
            taken += len(chunk)
            if taken > frames:
                raise UsageError(f"got {taken} frames or more for a clip of {frames}")
            if shape is not None and chunk.shape[1:] != shape:
                raise UsageError(f"frames must be equally large, got {list(chunk.shape[1:])} after {list(shape)}")
            if file is None or worker is None:
                shape = chunk.shape[1:]
                height, width = size or _check_size(shape[:2])
                file = stack.enter_context(_Mp4(temporary, path, height, width, fps, sample_rate, quality))
                worker = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="javis-encode"))
            if len(waiting) == 2:
                waiting.popleft().result()  # raises what the encoder raised
            waiting.append(worker.submit(file.add_frames, chunk))
        if file is None or taken != frames:
            raise UsageError(f"got {taken} frames for a clip of {frames}")
        if callable(audio):
            audio = audio()
            _check_audio(audio, frames, fps, sample_rate)
        while waiting:
            waiting.popleft().result()
        file.add_audio(audio)


class _Mp4:
    """An mp4 being written: all frames first, then all sound. Errors of the encoder become `FailedError`."""

    def __init__(
        self, file: Path, name: str | os.PathLike[str], height: int, width: int, fps: float, sample_rate: int,
        quality: int,
    ) -> None:  # fmt: skip
        self.file, self.name = file, name
        self.height, self.width, self.quality = height, width, quality
        self.rate, self.sample_rate = exact_rate(fps), sample_rate
        self.frames = 0

    def __enter__(self) -> _Mp4:
        import av

        # A common multiple of both rates as the movie's clock: the edit lists then hold both lengths without rounding.
        clock = math.lcm(self.rate.numerator, self.sample_rate)
        options = {"movflags": "+faststart", "movie_timescale": str(clock)}
        with self._errors():
            self.container = av.open(str(self.file), "w", format="mp4", options=options)
            self.picture = self.container.add_stream(
                "libx264", rate=self.rate, options={"crf": str(self.quality), "bf": "0"}
            )
            self.picture.width, self.picture.height, self.picture.pix_fmt = self.width, self.height, "yuv420p"
            self.picture.time_base = 1 / self.rate
            _tag_bt709(self.picture)
            self.sound = self.container.add_stream("aac", rate=self.sample_rate, layout="mono")
            self.sound.bit_rate, self.sound.time_base = 128_000, Fraction(1, self.sample_rate)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        import av

        # After a failure the file is thrown away, and the first error is the one to see.
        with self._errors() if kind is None else contextlib.suppress(av.error.FFmpegError):
            self.container.close()

    def add_frames(self, video: np.ndarray) -> None:
        """Encode uint8 [n,H,W,3]."""
        with self._errors():
            for image in video:
                frame = _video_frame(image, self.frames, self.rate, self.height, self.width)
                self.frames += 1
                for packet in self.picture.encode(frame):
                    self.container.mux(packet)

    def add_audio(self, audio: np.ndarray) -> None:
        """Encode float [N] and end both streams."""
        import av

        samples = np.clip(audio, -1, 1).astype(np.float32)[None]
        with self._errors():
            self.container.mux(list(self.picture.encode()))
            for start in range(0, samples.shape[1], _AAC_FRAME):
                chunk = np.ascontiguousarray(samples[:, start : start + _AAC_FRAME])
                frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = self.sample_rate, start, Fraction(1, self.sample_rate)
                self.container.mux(list(self.sound.encode(frame)))
            self.container.mux(list(self.sound.encode()))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import av

        try:
            yield
        except av.error.FFmpegError as error:
            raise FailedError(f"writing {self.name} failed: {error}") from error


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
                        pieces.append(mono_samples(frame))
    except av.error.FFmpegError as error:
        raise UsageError(f"cannot read {source} as a video: {error}; expected an mp4 or another video file") from None
    if not images:
        raise UsageError(f"{source} has no picture; expected a video file")
    audio = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return Clip(np.stack(images), audio[:length], fps, sample_rate)


def mono_samples(frame: av.AudioFrame) -> np.ndarray:
    """Samples of a decoded frame as float32 [N]: integers scaled to [-1, 1), channels averaged."""
    values = frame.to_ndarray()
    if np.issubdtype(values.dtype, np.integer):
        values = values / -float(np.iinfo(values.dtype).min) if values.dtype != np.uint8 else (values - 128.0) / 128
    if not frame.format.is_planar:
        values = values.reshape(-1, len(frame.layout.channels)).T
    return np.asarray(values.mean(axis=0), dtype=np.float32)
