"""One picture that shows whether picture and sound belong together: frames over log-mel on a single time axis."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np

from javis.media import atomic_file

_WIDTH_INCHES, _DPI = 13.0, 110
_LEFT, _RIGHT = 0.055, 0.985  # both axes share these, so that one vertical line means one time
_VIDEO_COLOUR, _AUDIO_COLOUR = "#00a6d6", "#ff7f0e"
_FLOOR_DB = -70.0


def contact_sheet(
    path: str | os.PathLike[str],
    video: np.ndarray,
    audio: np.ndarray,
    fps: float,
    sample_rate: int,
    *,
    title: str = "",
    video_events: Sequence[float] = (),
    audio_events: Sequence[float] = (),
    slots: int = 16,
) -> None:
    """Write a PNG: ``slots`` frames over the log-mel spectrogram, with the detected events on the same time axis.

    Args:
        path: file to write, all or nothing.
        video: uint8 [T,H,W,3]. audio: float [N] in [-1, 1]. fps: frames per second. sample_rate: Hz.
        title: printed above, wrapped; nothing in it is interpreted.
        video_events: times in seconds of what the picture shows (dashed lines, triangles above).
        audio_events: times in seconds of the onsets in the sound (solid lines, triangles below).
        slots: number of frames; each stands over the stretch of time from whose middle it was taken.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    seconds = len(video) / fps
    slots = max(1, min(slots, len(video)))
    lines = textwrap.wrap(title, 120)[:3]
    row = _WIDTH_INCHES * (_RIGHT - _LEFT) / slots * video.shape[1] / video.shape[2]
    row = min(row, 4.0)
    top, gap, mel, bottom = 0.32 + 0.22 * len(lines), 0.12, 2.2, 0.85
    height = top + row + gap + mel + bottom
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.text(_LEFT, 1 - 0.1 / height, "\n".join(lines), va="top", fontsize=11, parse_math=False)

    frames = figure.add_axes((_LEFT, (bottom + mel + gap) / height, _RIGHT - _LEFT, row / height))
    for slot in range(slots):
        image = video[int((slot + 0.5) * len(video) / slots)]
        left, right = slot * seconds / slots, (slot + 1) * seconds / slots
        frames.imshow(image, extent=(left, right, 0, 1), aspect="auto", interpolation="nearest")
        frames.axvline(right, color="white", linewidth=0.8)
    frames.set(xlim=(0, seconds), ylim=(0, 1), xticks=[], yticks=[])
    frames.set_ylabel("picture")

    sound = figure.add_axes((_LEFT, bottom / height, _RIGHT - _LEFT, mel / height))
    levels, edges = log_mel_picture(audio, sample_rate)
    sound.imshow(
        levels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=_FLOOR_DB,
        vmax=0,
        extent=(0, max(len(audio), 1) / sample_rate, 0, len(levels)),
    )
    ticks = [hz for hz in (250, 500, 1000, 2000, 4000, 8000, 16000) if hz <= sample_rate / 2]
    sound.set(xlim=(0, seconds), ylim=(0, len(levels)), xlabel="time (s)")
    sound.set_yticks(
        [float(np.interp(hz, edges, np.arange(len(edges)) - 0.5)) for hz in ticks], [str(t) for t in ticks]
    )
    sound.set_ylabel("sound, mel (Hz)")

    for axes in (frames, sound):
        for time in video_events:
            axes.axvline(time, color=_VIDEO_COLOUR, linestyle=(0, (4, 2)), linewidth=1.4)
        for time in audio_events:
            axes.axvline(time, color=_AUDIO_COLOUR, linewidth=1.0)
    frames.plot(list(video_events), [1.0] * len(video_events), "v", color=_VIDEO_COLOUR, clip_on=False, markersize=8)
    sound.plot(list(audio_events), [0.0] * len(audio_events), "^", color=_AUDIO_COLOUR, clip_on=False, markersize=8)
    seen = f"{len(video_events)} event{'s' * (len(video_events) != 1)} seen in the picture"
    heard = f"{len(audio_events)} onset{'s' * (len(audio_events) != 1)} heard in the sound"
    handles = [
        Line2D([], [], color=_VIDEO_COLOUR, linestyle=(0, (4, 2)), marker="v", label=seen),
        Line2D([], [], color=_AUDIO_COLOUR, marker="^", label=heard),
    ]
    figure.legend(handles=handles, loc="lower right", bbox_to_anchor=(_RIGHT, 0.0), ncols=2, frameon=False, fontsize=10)
    with atomic_file(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a title may hold letters the font lacks
        figure.savefig(temporary, format="png")


def log_mel_picture(audio: np.ndarray, sample_rate: int, bands: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Levels in dB under the loudest band, float32 [bands, frames] (5 ms apart), and the band edges in Hz [bands + 2].

    For the eye only; the model's own spectrogram is `javis.model`'s. Mel scale of O'Shaughnessy, triangles of height 1.
    """
    hop, window = max(1, sample_rate // 200), 1 << max(6, round(np.log2(sample_rate / 31)))
    padded = np.pad(np.asarray(audio, np.float32), (window // 2, window))
    count = max(1, -(-len(audio) // hop))
    index = hop * np.arange(count)[:, None] + np.arange(window)
    power = np.abs(np.fft.rfft(padded[index] * np.hanning(window), axis=1)) ** 2
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    hertz = np.arange(window // 2 + 1) * sample_rate / window
    rise = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rise, fall))
    # A band narrower than the distance of two bins holds none: it takes the nearest bin, or it would be a black line.
    empty = triangles.sum(axis=1) == 0
    nearest = np.abs(hertz - edges[1:-1, None]).argmin(axis=1)
    triangles[empty, nearest[empty]] = 1.0
    mel = power @ triangles.T
    return (10 * np.log10(np.maximum(mel, 1e-14) / max(float(mel.max()), 1e-6))).T.astype(np.float32), edges
