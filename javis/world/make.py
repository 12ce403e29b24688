"""Write clips with their truth: ``clip_%06d.mp4`` (VP9), ``.wav`` (16 bit), ``.json``, and ``manifest.csv``."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from javis.errors import FailedError, UsageError
from javis.world.render import render_video
from javis.world.scene import Scene, Split, WorldConfig, caption, is_held_out, sample_scene
from javis.world.synth import render_audio

MAX_COUNT = 1_000_000
VP9_CRF = 12  # of 0..63; 35 to 46 dB at 64x64, limited by the halved chroma resolution
_COLUMNS = ("id", "text", "video", "audio", "truth", "seed", "sources", "held_out")


class MakeResult(NamedTuple):
    """What ``make`` did."""

    directory: Path
    written: int
    skipped: int  # were there already


def make(
    out_dir: str | os.PathLike[str],
    count: int,
    seed: int = 0,
    config: WorldConfig | None = None,
    *,
    sources: int | None = None,
    split: Split = "any",
    progress: Callable[[int, int], None] | None = None,
) -> MakeResult:
    """Write ``count`` clips into ``out_dir``.

    Clip i is the scene of seed ``seed * 1_000_000 + i``: the same arguments give the same files, and a larger count
    extends a set. A clip is finished when its json is there, which is written last; finished clips are skipped. Each
    file appears under its name only when it is whole.

    Args:
        out_dir: created if absent.
        count: 1 to 1,000,000.
        seed: >= 0.
        config: format, ``WorldConfig()`` by default.
        sources, split: as in ``sample_scene``.
        progress: called with (clips done, count) after each clip.

    Raises:
        UsageError: unusable arguments, or ``out_dir`` holds clips of another seed or format.
        FailedError: a file could not be written.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
        raise UsageError(f"count {count!r}: expected a whole number from 1 to {MAX_COUNT}")
    config = config or WorldConfig()
    sample_scene(seed, config, sources=sources, split=split)  # refuses unusable arguments before anything is written
    directory = _writable_directory(Path(out_dir))
    written = 0
    rows = io.StringIO(newline="")
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(_COLUMNS)
    for i in range(count):
        scene = sample_scene(seed * MAX_COUNT + i, config, sources=sources, split=split)
        stem = directory / f"clip_{i:06d}"
        if not _finished(stem, scene):
            _write_clip(stem, scene)
            written += 1
        table.writerow(
            (stem.name, caption(scene), f"{stem.name}.mp4", f"{stem.name}.wav", f"{stem.name}.json")
            + (scene.seed, len(scene.sources), int(is_held_out(scene)))
        )
        if progress is not None:
            progress(i + 1, count)
    _write_atomically(directory / "manifest.csv", rows.getvalue().encode())
    return MakeResult(directory, written, count - written)


def _writable_directory(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write into {str(directory)!r} ({error.strerror}); give a directory that you may write to"
        ) from error
    return directory


def _finished(stem: Path, scene: Scene) -> bool:
    paths = [stem.with_suffix(suffix) for suffix in (".json", ".mp4", ".wav")]
    if not all(path.is_file() for path in paths):
        return False
    try:
        there = json.loads(paths[0].read_text(encoding="utf-8"))
    except ValueError:
        return False  # not what was written here; it is made again
    if there != scene.truth():
        raise UsageError(
            f"{str(paths[0])!r} is of another seed, split or format; give an empty directory or the same arguments"
        )
    return True


def _write_clip(stem: Path, scene: Scene) -> None:
    _write_atomically(stem.with_suffix(".mp4"), encode_vp9(render_video(scene), scene.config.fps))
    _write_atomically(stem.with_suffix(".wav"), encode_wav(render_audio(scene), scene.config.sample_rate))
    _write_atomically(stem.with_suffix(".json"), (json.dumps(scene.truth(), indent=1) + "\n").encode())


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise FailedError(f"cannot write {str(path)!r}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def encode_vp9(video: NDArray[np.uint8], fps: float) -> bytes:
    """Encode frames uint8 [T, H, W, 3] as VP9 (yuv420p) in mp4; one thread: same frames, same bytes."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        stream.bit_rate = 0  # constant quality
        stream.options = {"crf": str(VP9_CRF), "deadline": "good", "cpu-used": "4", "threads": "1", "row-mt": "0"}
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_wav(audio: NDArray[np.float32], sample_rate: int) -> bytes:
    """Encode mono float32 [N], |x| <= 1, as 16 bit PCM wav."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, audio, sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
