"""World clips as positives, with exact events, positions and sources, and material from other clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from javis.data.negatives import KINDS, Masklet, Negative, NoNegative
from javis.data.negatives_clip import Clip, Material, make_negative
from javis.world import Scene, WorldConfig, render_audio, render_video, sample_scene
from javis.world.render import object_alpha

DONORS = 40  # other clips tried for material that differs from the clip's own


def is_synchronous_scene(scene: Scene) -> bool:
    """Whether everything that sounds is seen, and something sounds: only then can picture and sound be out of step."""
    return any(s.events for s in scene.sources) and all(s.visible for s in scene.sources if s.audible)


def stem(scene: Scene, index: int) -> np.ndarray:
    """What one source of a scene sounds like alone, float32 [samples]; the stems add up to the sound of the scene."""
    sources = tuple(s if i == index else replace(s, events=()) for i, s in enumerate(scene.sources))
    return render_audio(replace(scene, sources=sources))


def world_clip(scene: Scene) -> Clip:
    """The clip of a scene; its events are those that are seen and heard, its stems its audible sources."""
    config = scene.config
    events, points = [], []
    for source in scene.sources:
        if source.visible and source.audible and source.path is not None:
            pose = source.path.pose(np.array([e.time for e in source.events]))
            events += [e.time for e in source.events]
            points += [(x * config.size, y * config.size) for x, y in zip(pose.x, pose.y, strict=True)]
    order = np.argsort(events) if events else []
    return Clip(
        video=render_video(scene),
        waveform=render_audio(scene),
        fps=config.fps,
        rate=config.sample_rate,
        events=tuple(float(events[i]) for i in order),
        points=np.array([points[i] for i in order], dtype=np.float64).reshape(-1, 2) if events else None,
        stems=tuple(stem(scene, i) for i, s in enumerate(scene.sources) if s.events),
    )


def world_masklet(scene: Scene, index: int) -> Masklet:
    """The exact cut-out of one visible object of a scene."""
    source, size = scene.sources[index], scene.config.size
    if source.path is None:
        raise NoNegative(f"video_masklet: source {index} of the scene is not seen")
    window, rows, columns = object_alpha(source, source.path.pose(scene.config.frame_times()), size)
    frames = render_video(scene)
    alpha: NDArray[np.float32] = np.zeros((len(frames), size, size), dtype=np.float32)
    alpha[np.arange(len(frames))[:, None, None], rows[:, :, None], columns[:, None, :]] = window
    return Masklet(frames, alpha)


def world_material(scene: Scene, rng: np.random.Generator, *, split: str = "train") -> Material:
    """An object and a sound that the scene has not: another colour, and another timbre or pitch class.

    ``split`` says which combinations the other clips may show (as in ``sample_scene``).
    """
    colours = {s.colour for s in scene.sources}
    sounds = {(s.timbre, s.pitch_class) for s in scene.sources if s.audible}
    masklet: Masklet | None = None
    source: np.ndarray | None = None
    times: tuple[float, ...] = ()
    for _ in range(DONORS):
        other = sample_scene(int(rng.integers(2**31)), scene.config, split=split)  # type: ignore[arg-type]
        for index, candidate in enumerate(other.sources):
            if masklet is None and candidate.visible and candidate.colour not in colours:
                masklet = world_masklet(other, index)
            if source is None and candidate.events and (candidate.timbre, candidate.pitch_class) not in sounds:
                source, times = stem(other, index), tuple(e.time for e in candidate.events)
        if masklet is not None and source is not None:
            break
    return Material(masklet, source, times)


def world_negatives(
    scene: Scene,
    clip: Clip,
    rng: np.random.Generator,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    split: str = "train",
) -> dict[str, Negative]:
    """One negative of each of ``kinds`` that the scene allows, by kind."""
    material = world_material(scene, rng, split=split)
    made = {}
    for kind in kinds:
        try:
            made[kind] = make_negative(kind, clip, material, rng)
        except NoNegative:
            continue
    return made


def draw_scene(seed: int, config: WorldConfig, *, split: str = "train") -> Scene:
    """The first of the scenes (seed, 0), (seed, 1), ... in which everything that sounds is seen."""
    for attempt in range(1000):
        scene = sample_scene(seed + attempt * 2**40, config, split=split)  # type: ignore[arg-type]
        if is_synchronous_scene(scene):
            return scene
    raise RuntimeError(f"no scene with something seen and heard from seed {seed} on")
