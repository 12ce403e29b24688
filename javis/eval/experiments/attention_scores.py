"""Localisation scores of attention maps against truth: how much of the mass lies where it should.

All scores are shares in 0..1, one for each head (and prior token), with what the same map would score by chance:

* ``chance``: mass spread evenly over what it could lie on;
* ``control``: the same map against a truth that is wrong: the place mirrored, the moment away from any event.

Names: L layers, H heads, T x P picture tokens (P = h * w places), Ta x M sound tokens. "Near" is within one latent
frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from javis.eval.experiments.attention_record import PRIOR_PICTURE, PRIOR_SOUND, TO_PICTURE, TO_SOUND
from javis.eval.experiments.attention_truth import OPPOSITE, Truth

NEAR = 1  # latent frames
MEASURES = {
    "prior_object": "spatial prior, picture: mass on the sources' pixels",
    "prior_side": "spatial prior, picture: source's side over both sides",
    "prior_sound": "spatial prior, sound: mass where the sources sound",
    "hearing_when": "sound of an event looks at frames near it",
    "hearing_where": "and there at the pixels of its source",
    "seeing_when": "pixels of a source at an event listen to moments near it",
    "seeing_band": "and there to the loudest band of the source",
}


class Score(NamedTuple):
    """A share for each head, [L, H] or [L, H, prior tokens]; the control has the same shape."""

    share: np.ndarray
    chance: float
    control: np.ndarray | None


def scores(maps: Mapping[str, np.ndarray], truth: Truth) -> dict[str, Score]:
    """All of `MEASURES` that the clip allows (without an event there is nothing to look for).

    Args:
        maps: one clip's probabilities by name of `Recorded`, [L, H, queries, keys].
        truth: of the same clip.
    """
    found: dict[str, Score] = {}
    objects = np.clip(truth.objects.sum(axis=0), 0, 1)  # [T, h, w]
    if objects.any():
        prior = over_places(maps[PRIOR_PICTURE])
        found["prior_object"] = Score(
            prior @ objects.ravel(), float(objects.mean()), prior @ objects[..., ::-1].ravel()
        )
        if truth.sides[0] in OPPOSITE:
            sides = {side: side_map(side, truth.objects.shape[1:]).ravel() for side in OPPOSITE}
            own, other = prior @ sides[truth.sides[0]], prior @ sides[OPPOSITE[truth.sides[0]]]
            found["prior_side"] = Score(own / (own + other), 0.5, other / (own + other))
    sounding = truth.levels.max(axis=0) > 0.2 * truth.levels.max() if truth.levels.max() > 0 else None
    if sounding is not None:
        heard = over_places(maps[PRIOR_SOUND])
        turned = np.roll(sounding, len(sounding) // 2, axis=0)
        found["prior_sound"] = Score(heard @ sounding.ravel(), float(sounding.mean()), heard @ turned.ravel())
    found |= _hearing(maps[TO_SOUND], truth)
    found |= _seeing(maps[TO_PICTURE], truth)
    return found


def over_places(probabilities: np.ndarray) -> np.ndarray:
    """Softmax over prior tokens [L, H, N, M] -> for each prior token its share of the places, [L, H, M, N]."""
    turned = np.swapaxes(probabilities, -1, -2)
    return np.asarray(turned / turned.sum(axis=-1, keepdims=True))


def side_map(side: str, grid: tuple[int, ...]) -> np.ndarray:
    """Share of each token [T, h, w] that lies in the left or right third of the picture."""
    frames, rows, columns = grid
    edges = np.arange(columns + 1) / columns
    low, high = (0.0, 1 / 3) if side == "left" else (2 / 3, 1.0)
    share = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * columns
    return np.broadcast_to(share, (frames, rows, columns)).copy()


def near(time: float, cells: int, frames: int, seconds: float) -> np.ndarray:
    """Which of ``cells`` slots of a clip lie in the latent frame of ``time`` or next to it; ``cells`` is a multiple of
    ``frames``. bool [cells]."""
    frame = min(int(time / seconds * frames), frames - 1)
    return np.asarray(np.abs(np.arange(cells) // (cells // frames) - frame) <= NEAR)


def quiet_moments(truth: Truth, frames: int) -> list[float]:
    """Middles of latent frames that have no event near them, but for those at the ends, which have fewer neighbours."""
    times = [(i + 0.5) * truth.seconds / frames for i in range(frames)]
    busy: np.ndarray = np.zeros(frames, bool)
    for event in (e for events in truth.events for e in events):
        busy |= near(event, frames, frames, truth.seconds)
    busy[:NEAR] = busy[frames - NEAR :] = True
    return [time for time, taken in zip(times, busy, strict=True) if not taken]


def _hearing(to_sound: np.ndarray, truth: Truth) -> dict[str, Score]:
    """Where the sound of an event looks: ``to_sound`` [L, H, Ta*M, T*P]."""
    frames, places = truth.objects.shape[1], truth.objects[0, 0].size
    slots = truth.levels.shape[1]
    when, where, mirrored, chance_when, chance_where = [], [], [], [], []
    for source, events in enumerate(truth.events):
        pixels = truth.objects[source]
        for event in events:
            queries = sound_of(event, truth.levels[source], slots, truth.seconds)
            if queries is None:
                continue
            window: np.ndarray = np.repeat(near(event, frames, frames, truth.seconds), places)
            looked = np.einsum("lhqk,q->lhk", to_sound, queries)
            inside = looked[..., window]
            when.append(inside.sum(-1))
            chance_when.append(window.mean())
            here, there = pixels.reshape(-1)[window], pixels[..., ::-1].reshape(-1)[window]
            if here.any():
                where.append(inside @ here / inside.sum(-1))
                mirrored.append(inside @ there / inside.sum(-1))
                chance_where.append(here.mean())
    found: dict[str, Score] = {}
    if when:
        still = []
        for moment in quiet_moments(truth, frames):
            rows: np.ndarray = np.repeat(_slots_at(moment, slots, truth.seconds), truth.levels.shape[2])
            window = np.repeat(near(moment, frames, frames, truth.seconds), places)
            still.append(to_sound[..., rows, :].mean(-2)[..., window].sum(-1))
        control = np.mean(still, axis=0) if still else None
        found["hearing_when"] = Score(np.mean(when, axis=0), float(np.mean(chance_when)), control)
    if where:
        found["hearing_where"] = Score(np.mean(where, axis=0), float(np.mean(chance_where)), np.mean(mirrored, axis=0))
    return found


def _seeing(to_picture: np.ndarray, truth: Truth) -> dict[str, Score]:
    """What the pixels of a source listen to at an event: ``to_picture`` [L, H, T*P, Ta*M]."""
    frames, (slots, bands) = truth.objects.shape[1], truth.levels.shape[1:]
    when, band, chance_when, still = [], [], [], []
    quiet = quiet_moments(truth, frames)
    for source, events in enumerate(truth.events):
        level = truth.levels[source]
        loudest = int(level.sum(axis=0).argmax())
        for moment, is_event in [(e, True) for e in events] + [(q, False) for q in quiet]:
            queries = pixels_at(moment, truth.objects[source], truth.seconds)
            if queries is None:
                continue
            window = near(moment, slots, frames, truth.seconds)
            heard = np.einsum("lhqk,q->lhk", to_picture, queries).reshape(*to_picture.shape[:2], slots, bands)
            inside = heard[..., window, :].sum(-2)  # [L, H, bands]
            if is_event:
                when.append(inside.sum(-1))
                chance_when.append(window.mean())
                band.append(inside[..., loudest] / inside.sum(-1))
            else:
                still.append(inside.sum(-1))
    if not when:
        return {}
    control = np.mean(still, axis=0) if still else None
    return {
        "seeing_when": Score(np.mean(when, axis=0), float(np.mean(chance_when)), control),
        "seeing_band": Score(np.mean(band, axis=0), 1 / bands, None),
    }


def _slots_at(moment: float, slots: int, seconds: float) -> np.ndarray:
    """bool [slots]: the slot of a moment and the next one, where a sound that begins then is loudest."""
    slot = min(int(moment / seconds * slots), slots - 1)
    return (np.arange(slots) == slot) | (np.arange(slots) == slot + 1)


def sound_of(event: float, level: np.ndarray, slots: int, seconds: float) -> np.ndarray | None:
    """Weights [slots * bands], sum 1, of the tokens in which the event sounds; None if none does."""
    weights = level * _slots_at(event, slots, seconds)[:, None]
    return weights.ravel() / weights.sum() if weights.sum() > 0 else None


def pixels_at(moment: float, objects: np.ndarray, seconds: float) -> np.ndarray | None:
    """Weights [T * P], sum 1, of the tokens of an object in the latent frame of a moment; None if it is not seen."""
    frames = len(objects)
    weights = np.zeros(objects.shape)
    frame = min(int(moment / seconds * frames), frames - 1)
    weights[frame] = objects[frame]
    return weights.ravel() / weights.sum() if weights.sum() > 0 else None
