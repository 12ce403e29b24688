"""Clips whose attention is looked at, and what is true of them on the grids of the model's tokens.

Kinds: ``single`` (one source), ``multiple`` (two sources whose events are apart, as everywhere in the world) and
``simultaneous`` (two sources with all events at the same times, which training never shows). The first source is on the
left in every other clip and on the right in the rest, so that a map that always favours one side gains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from javis.data.negatives_world import stem, world_masklet
from javis.eval.matching import match_events
from javis.eval.sync import PRIMARY, clause_events
from javis.eval.tracking import Picture
from javis.model.codecs import AudioCodec
from javis.world import Scene, WorldConfig, scene_from_prompt
from javis.world.motion import Flash, Knock
from javis.world.plan import strength
from javis.world.scene import Event, Source
from javis.world.vocabulary import ATTRIBUTES

KINDS = ("single", "multiple", "simultaneous")
FIRST_SEED = 1_900_000_000
OPPOSITE = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Truth:
    """What is true of a clip of K sources that are seen and heard.

    Attributes:
        objects: share of each picture token's patch that the source covers, float [K, T, h, w].
        levels: how far the source's sound stands above silence in each sound token's patch, float [K, Ta, M], >= 0.
        events: seconds, for each source.
        sides: "left", "middle" or "right", for each source.
        seconds: length of the clip.
    """

    objects: np.ndarray
    levels: np.ndarray
    events: tuple[tuple[float, ...], ...]
    sides: tuple[str, ...]
    seconds: float


def scenes(kind: str, count: int, world: WorldConfig, seed: int = FIRST_SEED) -> list[Scene]:
    """``count`` scenes of a kind, sides in turn. Pure function of its arguments.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    found: list[Scene] = []
    trial = seed + 10_000_000 * KINDS.index(kind)
    while len(found) < count:
        side = ("left", "right")[len(found) % 2]
        clauses = [_clause(side)] + [_clause(OPPOSITE[side])] * (kind != "single")
        if kind == "simultaneous":
            motion = ("flashes", "knocks")[len(found) // 2 % 2]
            clauses = [{**clause, "motion": motion} for clause in clauses]
        scene = scene_from_prompt(clauses, trial, world)
        found.append(together(scene) if kind == "simultaneous" else scene)
        trial += 1
    return found


def _clause(side: str) -> dict[str, Any]:
    return {**dict.fromkeys(ATTRIBUTES), "visible": True, "audible": True, "side": side}


def together(scene: Scene) -> Scene:
    """The scene with the second source's events at the times of the first's.

    Raises:
        ValueError: the two do not both flash or both knock.
    """
    first, second = scene.sources
    a, b = first.path, second.path
    if isinstance(a, Flash) and isinstance(b, Flash):
        moved: Source = replace(second, path=replace(b, times=a.times), events=first.events)
    elif isinstance(a, Knock) and isinstance(b, Knock):
        strengths = tuple(strength("knocks", 2 * b.depth / thrust) for thrust in a.thrusts)
        path = replace(b, times=a.times, thrusts=a.thrusts, returns=a.returns, strengths=strengths)
        events = tuple(Event(e.time, s) for e, s in zip(first.events, strengths, strict=True))
        moved = replace(second, path=path, events=events)
    else:
        raise ValueError("only two flashing or two knocking sources can be put together in time")
    return replace(scene, sources=(first, moved))


def on_tokens(maps: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Mean over the patch of each token: [..., T, H, W] -> [..., *grid], whole patches only."""
    split: list[int] = list(maps.shape[: -len(grid)])
    axes = []
    for length, cells in zip(maps.shape[-len(grid) :], grid, strict=True):
        if length % cells:
            raise ValueError(f"{length} values do not split into {cells} tokens")
        axes.append(len(split) + 1)
        split += [cells, length // cells]
    return np.asarray(maps, np.float64).reshape(split).mean(axis=tuple(axes))


def sound_levels(codec: AudioCodec, audio: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean height of the log-mel spectrogram over its level for silence, on the sound's tokens, [Ta, M]."""
    both = np.stack((audio, np.zeros_like(audio)))
    mel = codec.log_mel(torch.from_numpy(both).float())[:, 0].numpy()  # type: ignore[attr-defined]
    return on_tokens(np.maximum(mel[0] - mel[1], 0), grid)


def truth_of_scene(scene: Scene, codec: AudioCodec, picture: tuple[int, int, int], sound: tuple[int, int]) -> Truth:
    """Exact truth of a world scene on the grids of the picture's and the sound's tokens."""
    numbers = [i for i, s in enumerate(scene.sources) if s.visible and s.audible]
    return Truth(
        objects=np.stack([on_tokens(world_masklet(scene, i).alpha, picture) for i in numbers]),
        levels=np.stack([sound_levels(codec, stem(scene, i), sound) for i in numbers]),
        events=tuple(tuple(e.time for e in scene.sources[i].events) for i in numbers),
        sides=tuple(str(scene.sources[i].side) for i in numbers),
        seconds=scene.config.seconds,
    )


def truth_of_clip(
    video: np.ndarray,
    audio: np.ndarray,
    fps: float,
    sample_rate: int,
    clauses: Sequence[dict[str, Any]],
    codec: AudioCodec,
    picture: tuple[int, int, int],
    sound: tuple[int, int],
) -> Truth:
    """What the detectors find in a generated clip: objects by colour, and events that are both seen and heard (their
    time is that of the onset). The sound is not taken apart: all sources have its levels."""
    found = Picture(video)
    events = []
    for seen, heard in clause_events(found, audio, fps, sample_rate, clauses):
        events.append(tuple(sorted(heard[j] for _, j in match_events(seen, heard, PRIMARY))))
    levels = sound_levels(codec, audio, sound)
    return Truth(
        objects=np.stack([on_tokens(found.coverage[clause["colour"]], picture) for clause in clauses]),
        levels=np.stack([levels] * len(clauses)),
        events=tuple(events),
        sides=tuple(clause["side"] for clause in clauses),
        seconds=len(video) / fps,
    )
