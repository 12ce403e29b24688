"""The heat maps of one clip: over frames, and over time and frequency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from javis.contact_sheet import log_mel_picture
from javis.eval.experiments.attention_record import PRIOR_PICTURE, PRIOR_SOUND, TO_PICTURE, TO_SOUND
from javis.eval.experiments.attention_scores import over_places, pixels_at, sound_of
from javis.eval.experiments.common import save_figure

if TYPE_CHECKING:
    from javis.eval.experiments.attention import Example

_COLOURS = ("#00e5ff", "#ffd54f")  # of the sources' events and outlines


def plot_example(example: Example, best: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Write the heat maps of the best heads as PNG.

    Rows: the frames with the sources ringed; spatial prior of the picture; where the sound of all events looks; the
    sound with its events; spatial prior of the sound; what the pixels of all events listen to. Maps are over their
    mean: 1 is what even attention gives.
    """
    from matplotlib.figure import Figure as Sheet

    truth = example.truth
    frames, height, width = truth.objects.shape[1:]
    slots, bands = truth.levels.shape[1:]
    layer, head, token = best["prior_object"]
    prior = over_places(example.maps[PRIOR_PICTURE])[layer, head, token].reshape(frames, height, width)
    sheet = Sheet(figsize=(14, 8.6), layout="constrained")
    rows = sheet.subplots(6, 1, height_ratios=(1, 1, 1, 1.2, 1, 1))
    sheet.suptitle(f"{example.words}   ({example.name})", fontsize=11)
    strips: list[tuple[str, np.ndarray | None]] = [
        ("frames", None),
        (f"spatial prior, picture\nlayer {layer}, head {head}, token {token}", prior),
    ]
    looked = _looked(example, *best["hearing_where"][:2])
    strips.append(
        (f"sound of events looks at\nlayer {best['hearing_where'][0]}, head {best['hearing_where'][1]}", looked)
    )
    for axes, (title, values) in zip(rows[:3], strips, strict=True):
        _strip(sheet, axes, example, values)
        axes.set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")
    levels, _ = log_mel_picture(example.audio, example.sample_rate)
    rows[3].imshow(
        levels, origin="lower", aspect="auto", cmap="magma", vmin=-70, vmax=0, extent=(0, truth.seconds, 0, 1)
    )
    rows[3].set_ylabel("sound, mel", fontsize=8, rotation=0, ha="right", va="center")
    layer, head, token = best["prior_sound"]
    heard = over_places(example.maps[PRIOR_SOUND])[layer, head, token].reshape(slots, bands)
    listened = _listened(example, *best["seeing_when"][:2])
    for axes, values, title in (
        (rows[4], heard, f"spatial prior, sound\nlayer {layer}, head {head}, token {token}"),
        (
            rows[5],
            listened,
            f"pixels of events listen to\nlayer {best['seeing_when'][0]}, head {best['seeing_when'][1]}",
        ),
    ):
        axes.set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")
        if values is not None:
            image = axes.imshow(
                values.T / values.mean(), origin="lower", aspect="auto", cmap="viridis", vmin=0,
                extent=(0, truth.seconds, 0, bands),
            )  # fmt: skip
            sheet.colorbar(image, ax=axes, pad=0.01)
    for axes in rows:
        axes.set(xlim=(0, truth.seconds), yticks=[])
        for events, colour in zip(truth.events, _COLOURS, strict=False):
            for event in events:
                axes.axvline(event, color=colour, linewidth=1.2, linestyle="--")
    rows[5].set_xlabel("time (s); dashed: events of each source; maps over their mean")
    save_figure(sheet, path)


def _strip(sheet: Any, axes: Any, example: Example, values: np.ndarray | None) -> None:
    """One frame for each latent frame, side by side on the time axis, with the map in colour over it."""
    truth = example.truth
    frames, height, width = truth.objects.shape[1:]
    step = truth.seconds / frames
    top = 1.0 if values is None else float(values.max() / values.mean())
    image = None
    for frame in range(frames):
        place = (frame * step, (frame + 1) * step, 0, 1)
        picture = example.video[frame * len(example.video) // frames]
        if values is None:
            axes.imshow(picture, extent=place, aspect="auto")
        else:
            image = axes.imshow(values[frame] / values.mean(), extent=place, aspect="auto", vmin=0, vmax=top)
        for cover, colour in zip(truth.objects[:, frame], _COLOURS, strict=False):
            if cover.max() > 0.05:
                x = (cover.sum(0) @ (np.arange(width) + 0.5)) / cover.sum() / width
                y = (cover.sum(1) @ (np.arange(height) + 0.5)) / cover.sum() / height
                axes.plot(place[0] + x * step, 1 - y, "o", ms=9, markerfacecolor="none", markeredgecolor=colour)
        axes.axvline(place[1], color="white", linewidth=0.8)
    axes.set_ylim(0, 1)
    if image is not None:
        sheet.colorbar(image, ax=axes, pad=0.01)


def _looked(example: Example, layer: int, head: int) -> np.ndarray | None:
    """Where the sound of the events looks, mean over events, [T, h, w]."""
    truth, found = example.truth, []
    for source, events in enumerate(truth.events):
        for event in events:
            queries = sound_of(event, truth.levels[source], truth.levels.shape[1], truth.seconds)
            if queries is not None:
                found.append(queries @ example.maps[TO_SOUND][layer, head])
    return np.mean(found, axis=0).reshape(truth.objects.shape[1:]) if found else None


def _listened(example: Example, layer: int, head: int) -> np.ndarray | None:
    """What the pixels of the sources listen to at their events, mean over events, [Ta, M]."""
    truth, found = example.truth, []
    for source, events in enumerate(truth.events):
        for event in events:
            queries = pixels_at(event, truth.objects[source], truth.seconds)
            if queries is not None:
                found.append(queries @ example.maps[TO_PICTURE][layer, head])
    return np.mean(found, axis=0).reshape(truth.levels.shape[1:]) if found else None
