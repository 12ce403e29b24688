"""Clips and pictures inside the page, as far as they fit.

What no browser plays (a codec of its own, or the silent picture with a wav beside it that ``javis world make`` writes)
is encoded anew as H.264 and AAC.
"""

from __future__ import annotations

import base64
import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from javis.errors import FailedError, UsageError

if TYPE_CHECKING:
    import av
    import numpy as np

PICTURE = {"h264", "vp8", "vp9", "av1"}
SOUND = {"aac", "mp3", "opus", "vorbis", "flac"}
WIDE = 320  # pixels of a poster


@dataclass(frozen=True)
class Embedded:
    """A clip as a data URL, with a picture to show before it plays."""

    url: str
    poster: str
    width: int
    height: int
    seconds: float
    note: str = ""


@dataclass
class Embedder:
    """Puts files into the page until they are ``total`` bytes; a single one has at most ``each``.

    Attributes:
        used: bytes so far. left_out: files that did not fit. broken: files that could not be read, and why.
    """

    total: int
    each: int
    used: int = 0
    left_out: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def clip(self, path: Path) -> Embedded | str:
        """The clip, or why it is not in the page."""
        said = self._too_large(path.name, path.stat().st_size)
        if said is not None:
            return said
        try:
            width, height, seconds, playable = probe(path)
            poster = poster_of(path)
            wav = path.with_suffix(".wav")
            if playable and not (playable == "silent" and wav.is_file()):
                data, kind, note = path.read_bytes(), f"video/{path.suffix[1:]}", ""
                if playable == "silent":
                    note = "The clip has no sound."
            else:
                data, note = encoded_again(path, wav), "Encoded anew for the page, as H.264 and AAC."
                kind = "video/mp4"
        except (UsageError, FailedError, OSError) as error:
            self.broken.append((path.name, str(error)))
            return f"cannot be played: {error}"
        said = self._too_large(path.name, len(data))
        if said is not None:
            return said
        self.used += len(data) + len(poster)
        return Embedded(_url(kind, data), _url("image/jpeg", poster), width, height, seconds, note)

    def picture(self, path: Path) -> str | None:
        """A PNG as a data URL; None, noted in ``left_out`` or ``broken``, if it does not fit or is none."""
        data = path.read_bytes()
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            self.broken.append((path.name, "is no PNG"))
            return None
        if self._too_large(path.name, len(data)) is not None:
            return None
        self.used += len(data)
        return _url("image/png", data)

    def _too_large(self, name: str, size: int) -> str | None:
        """Why a file of ``size`` bytes is left out, or None."""
        if size > self.each:
            self.left_out.append(name)
            return f"not in the page: {_mb(size)} is over the limit of {_mb(self.each)} a clip (--max-clip-mb)"
        if self.used + size > self.total:
            self.left_out.append(name)
            return f"not in the page: the limit of {_mb(self.total)} for all clips and pictures is reached (--max-mb)"
        return None


def probe(path: Path) -> tuple[int, int, float, str]:
    """Width, height, seconds, and "yes" or "silent" if browsers play the file as it is, else "".

    Raises:
        UsageError: it cannot be read as a video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UsageError(f"{path.name} has no picture; expected a video file")
            picture = container.streams.video[0]
            seconds = _seconds(picture)
            good = picture.codec_context.name in PICTURE | {"libdav1d", "libvpx", "libvpx-vp9"}
            good = good and picture.codec_context.pix_fmt in ("yuv420p", "yuvj420p")
            sounds = container.streams.audio
            heard = bool(sounds) and all(s.codec_context.name in SOUND | {"mp3float", "libopus"} for s in sounds)
            size = picture.codec_context.width, picture.codec_context.height
    except av.error.FFmpegError as error:
        raise UsageError(f"{path.name} cannot be read as a video: {error}") from None
    if not good or (sounds and not heard):
        return (*size, seconds, "")
    return (*size, seconds, "yes" if sounds else "silent")


def _seconds(stream: av.VideoStream) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return float(stream.frames / stream.average_rate) if stream.average_rate and stream.frames else 0.0


def poster_of(path: Path) -> bytes:
    """A frame from the middle of a clip as JPEG, at most `WIDE` pixels wide.

    Raises:
        UsageError: no frame can be decoded.
    """
    import av

    found = None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            middle = stream.frames // 2
            for number, frame in enumerate(container.decode(stream)):
                found = frame
                if number >= middle:
                    break
            if found is None:
                raise UsageError(f"{path.name} has no frame")
            width = min(WIDE, found.width)
            image = found.reformat(
                width=width, height=max(1, round(found.height * width / found.width)), format="rgb24"
            ).to_ndarray()
    except av.error.FFmpegError as error:
        raise UsageError(f"{path.name} cannot be decoded: {error}") from None
    return _jpeg(image)


def _jpeg(image: np.ndarray) -> bytes:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image, format="jpeg", pil_kwargs={"quality": 80})
    return buffer.getvalue()


def encoded_again(path: Path, wav: Path) -> bytes:
    """The clip, with the sound of ``wav`` if it has none, as H.264 and AAC in mp4.

    Raises:
        UsageError: it cannot be decoded, or what it holds cannot be encoded. FailedError: the encoder failed.
    """
    import numpy as np

    from javis.media import AAC_SAMPLE_RATES, read_clip, samples_for, write_clip

    clip = read_clip(path)
    audio, rate = clip.audio, clip.sample_rate
    if not len(audio) and wav.is_file():
        audio, rate = _read_wav(wav)
    if rate not in AAC_SAMPLE_RATES:
        if len(audio):
            raise UsageError(f"its sound of {rate} Hz cannot be encoded for the page")
        rate = AAC_SAMPLE_RATES[0]
    wanted = samples_for(len(clip.video), clip.fps, rate)
    audio = np.pad(audio[:wanted], (0, max(0, wanted - len(audio))))
    height, width = (side - side % 2 for side in clip.video.shape[1:3])
    if not height or not width:
        raise UsageError(f"a picture of {clip.video.shape[2]}x{clip.video.shape[1]} cannot be encoded for the page")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "clip.mp4"
        write_clip(out, clip.video[:, :height, :width], audio, clip.fps, rate)
        return out.read_bytes()


def _read_wav(path: Path) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UsageError(f"{path.name} cannot be read as sound: {error}") from None
    return audio.mean(axis=1), int(rate)


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
