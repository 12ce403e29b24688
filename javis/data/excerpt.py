"""One clip from its files: which frames, which sound, and both decoded with PyAV.

Read in this order: `ExcerptRequest`, `index_video` (time stamps, without decoding), `choose_frames`, `decode_excerpt`.
Decoding workers import this module, so it stays light: numpy and PyAV, no torch.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from javis.data.places import is_url
from javis.media import mono_samples, samples_for

if TYPE_CHECKING:
    import av

MARGIN = 0.1  # seconds of sound decoded beyond the excerpt, so that its end is resampled like the rest


class BadClip(Exception):
    """A clip that cannot be used, and why."""


class Slice(NamedTuple):
    """A part of a file or URL: a member of a tar file."""

    path: str
    offset: int
    size: int


Place = str | Slice  # a whole file or URL, or a part of one


@dataclass(frozen=True)
class ExcerptRequest:
    """What is wanted of one clip."""

    path: Place
    audio_path: Place  # the same as ``path``: the sound is in the video file; empty: there is none
    num_frames: int
    height: int
    width: int
    fps: float  # of the frames that are taken
    sample_rate: int  # Hz
    start: float  # within [0, 1): of all frames at which the excerpt can begin
    audio_gap: float  # seconds of sound that may be missing

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def samples(self) -> int:
        return samples_for(self.num_frames, self.fps, self.sample_rate)

    @property
    def sound_inside(self) -> bool:
        return self.audio_path == self.path


class VideoIndex(NamedTuple):
    """What the packets of the first picture stream say."""

    codec: str  # as FFmpeg names it: "vp9", "h264"
    height: int
    width: int
    pts: NDArray[np.int64]  # time stamps in ticks of ``tick``, increasing
    keys: NDArray[np.int64]  # those of key frames
    tick: float  # seconds
    interval: float  # seconds of a usual frame
    matrix: int  # of its colours, as ISO/IEC 23091-2 numbers them: 1 is BT.709, 5 and 6 are BT.601, 2 is not said

    @property
    def times(self) -> NDArray[np.float64]:
        """Seconds at which the frames begin, from the first frame on."""
        return (self.pts - self.pts[0]) * self.tick

    @property
    def seconds(self) -> float:
        """From the begin of the first frame to the end of the last."""
        return float(self.times[-1]) + self.interval


class Excerpt(NamedTuple):
    """Frames of an excerpt by number, and the second of the first one, counted from the first frame of the file."""

    frames: NDArray[np.int64]  # [num_frames], not decreasing
    start: float


class Cover(NamedTuple):
    """Scale to ``height`` x ``width``, then cut at ``top``, ``left``."""

    height: int
    width: int
    top: int
    left: int


def cover(height: int, width: int, to_height: int, to_width: int) -> Cover:
    """How a frame is scaled to cover the wanted size, with the least that is cut off evenly on both sides."""
    scale = max(to_height / height, to_width / width)
    scaled = max(to_height, round(height * scale)), max(to_width, round(width * scale))
    return Cover(*scaled, (scaled[0] - to_height) // 2, (scaled[1] - to_width) // 2)


def read_bytes(place: Place) -> bytes:
    """All of a file, URL or part of one. Raises `BadClip`."""
    path, offset, size = place if isinstance(place, Slice) else (place, 0, -1)
    try:
        with _open_binary(path) as file:
            file.seek(offset)
            data = file.read(size)
    except (OSError, ValueError, ImportError) as error:  # an unknown protocol; a package for it that is missing
        raise BadClip(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) < size:
        raise BadClip(f"cannot be read: {path} ends {size - len(data)} bytes before it does")
    return data


def _open_binary(path: str) -> AbstractContextManager[BinaryIO]:
    """A local file or an fsspec URL for reading, in a ``with`` statement."""
    if not is_url(path):
        return open(path, "rb")
    import fsspec

    # Not its file alone: that of a file within a tar closes as soon as nobody holds on to the archive.
    return fsspec.open(path, "rb")  # type: ignore[no-any-return]


def _local(place: Place) -> bool:
    """Whether FFmpeg can read it as it is; everything else is read once."""
    return isinstance(place, str) and not is_url(place)


@contextlib.contextmanager
def _opened(place: Place, data: bytes | None = None) -> Iterator[av.container.InputContainer]:
    """An opened container; whatever FFmpeg finds wrong is a `BadClip`."""
    import av

    if data is None and not _local(place):
        data = read_bytes(place)
    try:
        with contextlib.ExitStack() as stack:
            # Files are handed over opened: FFmpeg would take a name with a colon for a protocol.
            file = io.BytesIO(data) if data is not None else stack.enter_context(open(str(place), "rb"))
            yield stack.enter_context(av.open(file, metadata_errors="ignore"))
    except (av.error.FFmpegError, ValueError, EOFError, MemoryError) as error:
        # OSError comes last: errors of FFmpeg are OSErrors too.
        raise BadClip(f"cannot be decoded: {getattr(error, 'strerror', None) or error}") from None
    except OSError as error:
        raise BadClip(f"cannot be read: {error.strerror or error}") from None


def index_video(place: Place, data: bytes | None = None) -> VideoIndex:
    """Time stamps of all frames, from the packets.

    Args:
        place: of the video file. data: its bytes, if they are at hand.

    Raises:
        BadClip: no such file, no picture in it, or not readable up to its end.
    """
    with _opened(place, data) as container:
        if not container.streams.video:
            raise BadClip("has no picture")
        stream = container.streams.video[0]
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and p.pts is not None]
        if not packets:
            raise BadClip("has no frame with a time stamp")
        if stream.time_base is None or stream.height < 1 or stream.width < 1:
            raise BadClip("has frames without a size or a clock")
        tick = float(stream.time_base)
        pts = np.unique(np.array([at for at, _ in packets], np.int64))
        keys = np.unique(np.array([at for at, key in packets if key], np.int64))
        rate = float(stream.average_rate or 0)
        interval = float(np.median(np.diff(pts))) * tick if len(pts) > 1 else 1 / rate if rate else tick
        context = stream.codec_context
        matrix = int(context.colorspace)
        return VideoIndex(context.name, stream.height, stream.width, pts, keys, tick, interval, matrix)


def choose_frames(index: VideoIndex, request: ExcerptRequest) -> Excerpt:
    """The frame that is on screen at each of the instants ``start + k / fps``.

    The excerpt begins with a frame of the file, so that at the file's own rate every frame is taken once.

    Raises:
        BadClip: the file is too short (by more than half a frame).
    """
    times = index.times
    latest = index.seconds + index.interval / 2 - request.seconds
    starts = int(np.searchsorted(times, latest, side="right"))
    if starts == 0:
        raise BadClip(f"lasts {index.seconds:.3g} s, and {request.seconds:.3g} s are wanted")
    start = float(times[min(int(request.start * starts), starts - 1)])
    # Time stamps are rounded to ticks, each by half a tick at most.
    instants = start + np.arange(request.num_frames) / request.fps + index.tick + 1e-9
    return Excerpt(np.searchsorted(times, instants, side="right") - 1, start)


def decode_frames(
    index: VideoIndex, excerpt: Excerpt, request: ExcerptRequest, data: bytes | None = None
) -> NDArray[np.uint8]:
    """The frames of an excerpt, scaled and cut: uint8 [num_frames, height, width, 3], sRGB.

    ``data``: the bytes of the file, if they are at hand.

    Raises:
        BadClip: one of them cannot be decoded.
    """
    wanted = index.pts[excerpt.frames]
    key = index.keys[index.keys <= wanted[0]]
    from_key = int(key[-1]) if len(key) and key[-1] > index.pts[0] else None
    out: NDArray[np.uint8] = np.empty((request.num_frames, request.height, request.width, 3), np.uint8)
    missing = _decode(request, data, wanted, out, from_key)
    if missing and from_key is not None:  # containers that cannot seek well: from the beginning
        missing = _decode(request, data, wanted, out, None)
    if missing:
        at = (min(missing) - int(index.pts[0])) * index.tick
        raise BadClip(f"cannot be decoded: no frame comes for {at:.3f} s")
    return out


def _decode(
    request: ExcerptRequest, data: bytes | None, wanted: NDArray[np.int64], out: NDArray[np.uint8], seek: int | None
) -> set[int]:
    """Fill ``out`` with the frames of the time stamps ``wanted``; returns those that did not come."""
    from av.video.reformatter import Interpolation, VideoReformatter

    # Chroma is interpolated and nothing is rounded early: the same pixels as DALI's CPU decoder gives.
    how = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
    reformatter = VideoReformatter()  # keeps its tables from frame to frame
    missing = set(map(int, wanted))
    with _opened(request.path, data) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # clips are decoded side by side instead
        if seek is not None:
            container.seek(seek, stream=stream)
        for frame in container.decode(stream):
            if frame.pts not in missing:
                continue
            to = cover(frame.height, frame.width, request.height, request.width)
            image = reformatter.reformat(frame, to.width, to.height, "rgb24", interpolation=how).to_ndarray()
            rows, columns = slice(to.top, to.top + request.height), slice(to.left, to.left + request.width)
            out[wanted == frame.pts] = image[rows, columns]
            missing.remove(frame.pts)
            if not missing:
                break
    return missing


def decode_sound(
    index: VideoIndex, excerpt: Excerpt, request: ExcerptRequest, data: bytes | None = None
) -> NDArray[np.float32]:
    """The sound of an excerpt: float32 [samples], mono (channels averaged), at ``request.sample_rate``.

    In the video file itself the clock of the container counts; the sound of a separate file begins with the picture.
    ``data``: the bytes of the video file, if they are at hand.

    Raises:
        BadClip: no sound, not decodable, not finite, or more than ``audio_gap`` seconds missing.
    """
    if not request.audio_path:
        raise BadClip("has no sound")
    start = excerpt.start + (float(index.pts[0]) * index.tick if request.sound_inside else 0.0)
    until = start + request.seconds + MARGIN
    pieces: list[NDArray[np.float32]] = []
    begin, rate, dropped = 0.0, 0, 0
    try:
        with _opened(request.audio_path, data if request.sound_inside else None) as container:
            stream = container.streams.audio[0] if container.streams.audio else None
            if stream is None or not stream.rate:
                raise BadClip("has no sound")
            rate, decoded = stream.rate, 0
            for frame in container.decode(stream):
                if not decoded and request.sound_inside and frame.pts is not None and frame.time_base is not None:
                    begin = float(frame.pts * frame.time_base)
                pieces.append(mono_samples(frame))
                decoded += len(pieces[-1])
                if begin + decoded / rate > until:
                    break
                if begin + decoded / rate < start - 1:  # a long file is not kept up to the excerpt
                    pieces, dropped = [], decoded
    except BadClip as error:
        # A separate file is named; the video file is by whoever reports the clip.
        raise BadClip(str(error) if request.sound_inside else f"{_sound_file(request)} {error}") from None
    wave = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    extra = -dropped % (rate // math.gcd(rate, request.sample_rate))  # the samples that come out stay where they were
    begin += (dropped + extra) / rate
    return cut_sound(resample(wave[extra:], rate, request.sample_rate), start - begin, request)


def _sound_file(request: ExcerptRequest) -> str:
    return f"sound file {request.audio_path}" if isinstance(request.audio_path, str) else "its sound file"


def cut_sound(wave: NDArray[np.float32], start: float, request: ExcerptRequest) -> NDArray[np.float32]:
    """``request.samples`` samples from second ``start`` of ``wave`` on, with zeros where nothing is."""
    first = math.floor(start * request.sample_rate + 0.5)
    out: NDArray[np.float32] = np.zeros(request.samples, np.float32)
    inside = wave[max(first, 0) : max(first + request.samples, 0)]
    missing = request.samples - len(inside)
    if missing > request.audio_gap * request.sample_rate:
        raise BadClip(f"sound is missing for {missing / request.sample_rate:.3g} s of {request.seconds:.3g} s")
    out[max(-first, 0) :][: len(inside)] = inside
    if not np.isfinite(out).all():
        raise BadClip("sound has values that are not finite")
    return out


def resample(wave: NDArray[np.float32], rate: int, to: int) -> NDArray[np.float32]:
    """float32 [N] at ``rate`` Hz -> at ``to`` Hz, nothing shifted in time; unchanged if the rates are equal."""
    import av

    if rate == to or not len(wave):
        return wave
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=to)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None]), format="fltp", layout="mono")
    frame.sample_rate = rate
    pieces = [piece.to_ndarray()[0] for given in (frame, None) for piece in resampler.resample(given)]
    return np.concatenate(pieces)


def decode_excerpt(request: ExcerptRequest) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Frames uint8 [T, H, W, 3] and sound float32 [samples] of the same time span. Raises `BadClip`."""
    data = None if _local(request.path) else read_bytes(request.path)
    index = index_video(request.path, data)
    excerpt = choose_frames(index, request)
    # The sound first: it is cheap, and what is wrong with it spares decoding the picture.
    sound = decode_sound(index, excerpt, request, data)
    return decode_frames(index, excerpt, request, data), sound


class EncodedExcerpt(NamedTuple):
    """What DALI needs of one clip."""

    codec: str
    video: bytes
    sound: bytes | NDArray[np.float32] | None  # the file; decoded, at the rate wanted; None: not in a format of DALI
    frames: NDArray[np.int64]
    start: float
    height: int
    width: int
    matrix: int  # as in `VideoIndex`


# First bytes of the files whose sound DALI decodes.
_SOUND_FILES = (b"RIFF", b"fLaC", b"OggS")


def read_excerpt(request: ExcerptRequest, decode_other: bool) -> EncodedExcerpt:
    """The files of a clip as they are, and which frames of them are wanted.

    Args:
        decode_other: sound in formats that DALI cannot decode is decoded here, and left out otherwise.

    Raises:
        BadClip: as `decode_excerpt`, as far as it shows without decoding.
    """
    if not request.audio_path:
        raise BadClip("has no sound")
    video = read_bytes(request.path)
    index = index_video(request.path, video)
    excerpt = choose_frames(index, request)
    sound: bytes | NDArray[np.float32] | None = None
    if not request.sound_inside:
        try:
            sound = read_bytes(request.audio_path)
        except BadClip as error:
            raise BadClip(f"{_sound_file(request)} {error}") from None
    if sound is None or not sound.startswith(_SOUND_FILES):
        # Decoded even if it is not wanted: what nobody can decode is a broken file and not one of another format.
        decoded = decode_sound(index, excerpt, request, video)
        sound = decoded if decode_other else None
    return EncodedExcerpt(index.codec, video, sound, excerpt.frames, excerpt.start, *index[1:3], index.matrix)
