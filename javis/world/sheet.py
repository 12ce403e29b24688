"""Contact sheet of the world: for each scene, frames over the spectrogram on one time axis, events marked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from javis.errors import FailedError
from javis.world.render import COLOURS, render_video
from javis.world.scene import Scene, WorldConfig, caption, scene_from_prompt
from javis.world.synth import render_audio

SHOWN = (
    "a large red wooden ball bounces on the left",
    "a small blue glass box bounces on the right",
    "a large yellow metal star swings in the middle",
    "a small white wooden triangle swings on the left",
    "a large green metal box knocks in the middle",
    "a small purple glass star knocks on the right",
    "a large white triangle flashes on the left",
    "a small yellow ball flashes in the middle",
    "a large red wooden ball bounces on the left and a small green glass star knocks on the right",
    "a small blue metal triangle swings on the right and a large purple box flashes on the left",
    "a large green star floats silently in the middle",
    "a small red box floats silently on the right and an unseen large metal bell rings",
)
_FRAMES = 12
_LOWEST, _HIGHEST = 150.0, 7000.0  # Hz, of the frequency axis


def log_spectrogram(audio: NDArray[np.float32], sample_rate: int, window: int = 512, hop: int = 64) -> NDArray[Any]:
    """Magnitude in dB of full scale (floor -70) on 96 logarithmic frequencies, [96, frames]; column k is at k * hop."""
    padded = np.pad(audio, window // 2)
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    taper = np.hanning(window)
    magnitude = np.abs(np.fft.rfft(pieces * taper, axis=1)) / taper.sum() * 2
    wanted = np.geomspace(_LOWEST, min(_HIGHEST, 0.5 * sample_rate), 96)
    have = np.fft.rfftfreq(window, 1 / sample_rate)
    rows = np.stack([np.interp(wanted, have, column) for column in magnitude], 1)
    return np.asarray(np.maximum(20 * np.log10(rows + 1e-9), -70.0))


def contact_sheet(
    path: str | os.PathLike[str],
    scenes: Sequence[Scene] | None = None,
    *,
    seed: int = 0,
    config: WorldConfig | None = None,
) -> None:
    """Write a PNG of ``scenes`` in two columns; without scenes, twelve that show every motion, material and kind.

    A dashed line crosses frames and spectrogram at each event, in the colour of its source (grey: unseen).

    Raises:
        FailedError: the file could not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if scenes is None:
        scenes = [scene_from_prompt(prompt, seed + i, config) for i, prompt in enumerate(SHOWN)]
    rows = (len(scenes) + 1) // 2
    figure = Figure(figsize=(16, 1.95 * rows), dpi=100)
    FigureCanvasAgg(figure)
    cells = figure.add_gridspec(
        rows, 2, left=0.03, right=0.995, top=1 - 0.16 / rows, bottom=0.2 / rows, hspace=0.42, wspace=0.07
    )
    for k, scene in enumerate(scenes):
        pair = cells[k // 2, k % 2].subgridspec(2, 1, height_ratios=[1, 1.25], hspace=0.0)
        frames, sound = figure.add_subplot(pair[0]), figure.add_subplot(pair[1])
        _draw_scene(frames, sound, scene)
        sound.set_xlabel("seconds" if k // 2 == rows - 1 else "", fontsize=7)
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", metadata={"Software": None})
        os.replace(temporary, path)
    except OSError as error:
        raise FailedError(f"cannot write {os.fspath(path)!r}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _draw_scene(frames: Any, sound: Any, scene: Scene) -> None:
    seconds, video = scene.config.seconds, render_video(scene)
    # Each picture stands where its instant is the middle of its width.
    instants = (np.arange(_FRAMES) + 0.5) * seconds / _FRAMES
    shown = video[np.minimum(np.round(instants * scene.config.fps).astype(int), len(video) - 1)]
    strip = np.concatenate(list(np.pad(shown, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)), axis=1)
    frames.imshow(strip, extent=(0, seconds, 0, 1), aspect="auto", interpolation="nearest")
    frames.set_title(caption(scene), fontsize=8, pad=3, loc="left")
    frames.set_xticks([])
    frames.set_yticks([])
    levels = log_spectrogram(render_audio(scene), scene.config.sample_rate)
    sound.imshow(levels, extent=(0, seconds, 0, 1), origin="lower", aspect="auto", cmap="magma", vmin=-70, vmax=-10)
    span = np.log(min(_HIGHEST, 0.5 * scene.config.sample_rate) / _LOWEST)
    ticks = [200, 500, 1000, 2000, 5000]
    sound.set_yticks([np.log(hz / _LOWEST) / span for hz in ticks], ["200", "500", "1k", "2k", "5k Hz"], fontsize=6)
    sound.tick_params(axis="x", labelsize=6, pad=1, length=2)
    sound.set_xlim(0, seconds)
    for time, index, _ in scene.events:
        colour = scene.sources[index].colour
        ink = tuple(c / 255 for c in COLOURS[colour]) if colour else (0.7, 0.7, 0.7)
        for axes in (frames, sound):
            axes.axvline(time, color=ink, linewidth=1.1, linestyle=(0, (3, 2)))
