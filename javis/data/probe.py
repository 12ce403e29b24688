"""What a clip's files really hold: frames, sizes, time stamps, samples; headers that promise more than there is.

`measure` is called in worker processes (`javis.data.workers`): it may meet any file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import stat
import statistics
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from javis.data.places import is_url, open_bytes
from javis.errors import UsageError

if TYPE_CHECKING:
    import av

MAX_PIXELS = 1 << 28  # of a frame; a header may claim any size
SAME_TIME = 0.02  # seconds: half a frame at 25 per second, and less than anyone hears


class ClipFiles(NamedTuple):
    """What to measure."""

    path: str
    audio_path: str  # empty: no sound; equal to ``path``: in the same file
    decode: bool = True  # False: headers and packets only, which says nothing about what is in them


@dataclass(frozen=True)
class Picture:
    """The video stream. Seconds are those of its time stamps."""

    frames: int
    height: int
    width: int
    fps: float  # of the time stamps; the header's own fraction where it says the same
    header_fps: float  # 0 if the header says nothing
    start: float
    seconds: float
    uneven: float  # largest deviation of an interval between frames from the median, as a share of it
    digest: str  # of the decoded frames


@dataclass(frozen=True)
class Sound:
    """The sound stream."""

    samples: int  # per channel
    sample_rate: int
    start: float
    seconds: float
    peak: float  # largest magnitude; full scale is 1
    is_finite: bool
    digest: str  # of the decoded samples


@dataclass(frozen=True)
class ClipFacts:
    """What `measure` found; ``faults`` are (kind, what) with kinds of `javis.data.doctor_rules`."""

    picture: Picture | None
    sound: Sound | None
    file_digest: str
    faults: tuple[tuple[str, str], ...]


def measure(files: ClipFiles) -> ClipFacts:
    """Read a clip. Whatever is wrong with its files is a fault in the result, not an exception."""
    faults: list[tuple[str, str]] = []
    digest = hashlib.blake2b(digest_size=16)
    names = dict.fromkeys(name for name in (files.path, files.audio_path) if name)
    for name in names:
        try:
            _check_file(name, digest, faults, whole=files.decode)
        except (OSError, UsageError) as error:
            faults.append(("missing_file", f"{name}: {_reason(error)}"))
    picture, sound = None, None
    if not any(kind == "missing_file" for kind, _ in faults):
        picture = _picture(files, faults)
        if files.audio_path:
            sound = _sound(files, faults)
        if picture is not None and not any(kind in ("truncated", "unreadable") for kind, _ in faults):
            _check_end(files, picture, sound, faults)
    return ClipFacts(picture, sound, digest.hexdigest() if files.decode else "", tuple(faults))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


# -- files ------------------------------------------------------------------------------------------------------------


def _check_file(name: str, digest: Any, faults: list[tuple[str, str]], *, whole: bool) -> None:
    """Digest of a file, and whether it is as long as its outermost structure says."""
    if not is_url(name) and not stat.S_ISREG(os.stat(name).st_mode):
        raise OSError(0, "not a file")  # a pipe would never answer
    with open_bytes(name) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if whole:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        file.seek(0)
        wanted = _promised_size(file, size)
    if wanted is not None and wanted > size:
        faults.append(("truncated", f"{Path(name).name} has {size} bytes, its header promises {wanted}"))


def _promised_size(file: Any, size: int) -> int | None:
    """Bytes that a RIFF (wav, avi) or ISO (mp4, mov) file ought to have at least; None: cannot be told.

    FFmpeg plays what is there without a word.
    """
    head = file.read(12)
    if head[:4] == b"RIFF" and len(head) == 12:
        place = 12
        while place + 8 <= size:  # the total is often left at 0 by programs that stream, so the chunks count
            file.seek(place)
            name, length = struct.unpack("<4sI", file.read(8))
            if length == 0xFFFFFFFF or (name == b"data" and length == 0):
                return None
            place += 8 + length
            if name == b"data":
                return place
            place += length % 2
        return place if place > size else None
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"styp"):
        place = 0
        while place + 8 <= size:
            file.seek(place)
            box = file.read(16)
            length = int.from_bytes(box[:4], "big")
            if length == 1 and len(box) == 16:
                length = int.from_bytes(box[8:16], "big")
            if length < 8:  # 0: to the end of the file
                return None
            place += length
        return place
    return None


# -- streams ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _container(path: str) -> Iterator[av.container.InputContainer]:
    import av

    if is_url(path):
        with open_bytes(path) as file, av.open(file, metadata_errors="ignore") as container:
            yield container
    else:
        # A playlist may name other places; a data set has no business there.
        options = {"protocol_whitelist": "file"}
        with av.open(os.path.abspath(path), options=options, metadata_errors="ignore") as container:
            yield container


def _frames(stream: Any, decode: bool) -> Iterator[Any]:
    """Frames of a stream, or packets of frames."""
    context = stream.codec_context
    context.thread_count = 1
    if stream.type == "video":
        context.options = {"max_pixels": str(MAX_PIXELS)}
    for packet in stream.container.demux(stream):
        if decode:
            yield from packet.decode()
        elif packet.size:
            yield packet


class _Reader(ABC):
    """Reads the first stream of a kind; whatever is wrong with it becomes a fault."""

    kind: ClassVar[Literal["video", "audio"]]
    word: ClassVar[str]  # for the kind, in messages
    missing: ClassVar[str]  # kind of fault where there is no such stream

    def __init__(self, path: str, decode: bool, faults: list[tuple[str, str]]) -> None:
        self.path, self.name, self.decode, self.faults = path, Path(path).name, decode, faults
        self.digest = hashlib.blake2b(digest_size=16)

    @abstractmethod
    def begin(self, stream: Any) -> bool:
        """Take note of the header; whether frames are wanted as well."""

    @abstractmethod
    def add(self, frame: Any) -> bool:
        """Take note of a frame, or of a packet if nothing is decoded; whether to go on."""

    @abstractmethod
    def place(self) -> str:
        """Which frame comes next, for messages."""

    def read(self) -> bool:
        """Whether there is such a stream in a container that can be read."""
        import av

        try:
            with _container(self.path) as container:
                streams: Any = getattr(container.streams, self.kind)
                if not streams:
                    return self._fault(self.missing, f"{self.name} has no {self.word} stream")
                if streams[0].codec_context is None:
                    return self._fault("unreadable", f"{self.name} has a {self.word} codec that FFmpeg does not know")
                if self.begin(streams[0]):
                    try:
                        for frame in _frames(streams[0], self.decode):
                            if not self.add(frame):
                                break
                    except av.error.FFmpegError as error:
                        self._fault("unreadable", f"decoding stops at {self.place()}: {_reason(error)}")
        except (av.error.FFmpegError, UsageError, OSError) as error:
            return self._fault("unreadable", f"{self.name}: {_reason(error)}")
        return True

    def _fault(self, kind: str, what: str) -> bool:
        self.faults.append((kind, what))
        return False


class _PictureReader(_Reader):
    kind, word, missing = "video", "video", "unreadable"

    def begin(self, stream: Any) -> bool:
        self.header_fps, self.promised = float(stream.average_rate or 0), stream.frames
        self.shape = (stream.codec_context.height, stream.codec_context.width)
        self.times: list[float] = []
        self.count = 0
        return True

    def add(self, frame: Any) -> bool:
        self.count += 1
        if frame.pts is not None:
            self.times.append(float(frame.pts * frame.time_base))
        if self.decode:
            if frame.is_corrupt:
                return self._fault("unreadable", f"frame {self.count - 1} is damaged")
            self.shape = (frame.height, frame.width)
            _update(self.digest, frame)
        return True

    def place(self) -> str:
        return f"frame {self.count}"


class _SoundReader(_Reader):
    kind, word, missing = "audio", "sound", "no_audio"

    def begin(self, stream: Any) -> bool:
        self.rate, self.end = stream.rate, _promised_end(stream)
        self.header_start = float((stream.start_time or 0) * (stream.time_base or 0))
        self.start: float | None = None
        self.samples, self.peak, self.is_finite = 0, 0.0, True
        return self.decode  # packets say nothing of samples

    def add(self, frame: Any) -> bool:
        if self.start is None:
            self.start = frame.time or 0.0
        values = _values(frame)
        self.samples += values.shape[1]
        self.is_finite = self.is_finite and bool(np.isfinite(values).all())
        self.peak = max(self.peak, float(np.abs(values).max(initial=0.0)))
        self.digest.update(values.T.tobytes())  # frames of other lengths hold the same sound
        return True

    def place(self) -> str:
        return f"sample {self.samples} of the sound"


def _picture(files: ClipFiles, faults: list[tuple[str, str]]) -> Picture | None:
    found = _PictureReader(files.path, files.decode, faults)
    if not found.read():
        return None
    if not found.count or 0 in found.shape:
        if not any(kind == "unreadable" for kind, _ in faults):
            faults.append(("unreadable", f"{found.name} has no frame"))
        return None
    fps, seconds, uneven = _pace(found.times, found.count, found.header_fps)
    start = min(found.times, default=0.0)
    if found.promised > found.count:
        faults.append(("truncated", f"{found.count} of {found.promised} frames"))
    digest = found.digest.hexdigest()
    return Picture(found.count, *found.shape, fps, found.header_fps, start, seconds, uneven, digest)


def _sound(files: ClipFiles, faults: list[tuple[str, str]]) -> Sound | None:
    found = _SoundReader(files.audio_path, files.decode, faults)
    if not found.read():
        return None
    rate, end = found.rate, found.end
    if not files.decode:
        length = 0.0 if end is None else end - found.header_start
        return Sound(round(length * rate), rate, 0.0, length, 0.0, True, "")
    if not found.samples or not rate:
        faults.append(("no_audio", f"{found.name} has no sound in it"))
        return None
    seconds, begin = found.samples / rate, found.start or 0.0
    if end is not None and begin < end < begin + seconds:  # the rest fills up the last packet
        seconds = end - begin
    if end is not None and begin + seconds < end - 0.1:
        faults.append(("truncated", f"sound ends at {begin + seconds:.3f} s, its header promises {end:.3f} s"))
    return Sound(found.samples, rate, begin, seconds, found.peak, found.is_finite, found.digest.hexdigest())


def _promised_end(stream: Any) -> float | None:
    """Seconds at which the header says that ``stream`` ends; None: it does not say."""
    if stream.duration is None or stream.time_base is None:
        return None
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base)


def _check_end(files: ClipFiles, picture: Picture, sound: Sound | None, faults: list[tuple[str, str]]) -> None:
    """Matroska and webm promise the length of the whole file and not that of a stream."""
    with _container(files.path) as container:
        kinds = sorted(stream.type for stream in container.streams)
        silent_about_streams = all(stream.duration is None for stream in container.streams)
        promised = (container.duration or 0) / 1e6 + (container.start_time or 0) / 1e6
    with_sound = kinds == ["audio", "video"] and files.audio_path == files.path and sound is not None
    if not silent_about_streams or not promised or not (kinds == ["video"] or with_sound):
        return
    end = picture.start + picture.seconds
    if with_sound and sound is not None:
        end = max(end, sound.start + sound.seconds)
    if end < promised - max(2 / picture.fps, 0.1):
        faults.append(
            ("truncated", f"{Path(files.path).name} ends at {end:.3f} s, its header promises {promised:.3f} s")
        )


def _update(digest: Any, frame: av.VideoFrame) -> None:
    try:
        values = frame.to_ndarray()
    except ValueError:  # a pixel format that PyAV cannot hand over as it is
        values = frame.to_ndarray(format="rgb24")
    digest.update(f"{frame.height}x{frame.width}".encode())
    digest.update(np.ascontiguousarray(values).data)


def _pace(times: list[float], count: int, header_fps: float) -> tuple[float, float, float]:
    """Frames per second, length in seconds and unevenness of time stamps."""
    times = sorted(times)
    if len(times) < 2 or times[-1] <= times[0]:
        fps = header_fps or 1.0
        return fps, count / fps, 0.0
    steps = [b - a for a, b in itertools.pairwise(times)]
    median = statistics.median(steps)
    span = times[-1] - times[0]
    fps = (len(times) - 1) / span
    if header_fps > 0 and abs((len(times) - 1) / header_fps - span) <= SAME_TIME:
        fps = header_fps  # time stamps are often whole milliseconds
    uneven = max(abs(step - median) for step in steps) / median if median > 0 else float("inf")
    return fps, span + 1 / fps, uneven


def _values(frame: av.AudioFrame) -> np.ndarray:
    """Samples of a frame as float32 [channels, n], integers scaled to [-1, 1)."""
    values = frame.to_ndarray()
    if values.dtype == np.uint8:
        values = (values.astype(np.float32) - 128) / 128
    elif np.issubdtype(values.dtype, np.integer):
        values = values / -float(np.iinfo(values.dtype).min)
    if not frame.format.is_planar:
        values = values.reshape(-1, len(frame.layout.channels)).T
    return np.ascontiguousarray(values, dtype=np.float32)
