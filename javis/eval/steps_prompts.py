"""The prompts of ``javis eval steps``: one and two sources, off-screen sounds, silence; all held out of training."""

from __future__ import annotations

from typing import Any, NamedTuple

from javis.errors import UsageError
from javis.eval.world_report import held_out_scenes


class Prompt(NamedTuple):
    """A scene whose caption is the prompt, and the seed of the clip that is made from it."""

    scene: Any
    seed: int


def prompts(count: int, seed: int, *, split: str = "held_out", config: Any = None) -> list[Prompt]:
    """``count`` prompts of one source, ``count`` of two, a quarter of it with an off-screen one, an eighth silent.

    Those of one and two sources and the silent ones are the scenes and seeds of ``javis eval world``. An off-screen
    source is an unseen bell beside an object that sounds (even ones) or is silent (odd ones); the world trains on the
    latter only. The kinds are mixed, so that the first few prompts are of all kinds.

    Args:
        count: prompts of one source, >= 1.
        seed: of the first scene, >= 0; the clip of prompt i gets ``seed + i``.
        split: "held_out", "train" or "any" (`javis.world.sample_scene`).
        config: a ``WorldConfig``; None: the world's own.

    Raises:
        UsageError: an argument outside these.
    """
    if split not in ("held_out", "train", "any"):
        raise UsageError(f"split {split!r}: expected held_out, train or any")
    scenes = held_out_scenes(count, seed, split=split, config=config)
    numbered = [Prompt(scene, seed + i) for i, scene in enumerate(scenes)]
    one, two, silent = numbered[:count], numbered[count : 2 * count], numbered[2 * count :]
    first = seed + len(numbered)
    unseen = [Prompt(s, first + i) for i, s in enumerate(_off_screen(max(1, count // 4), first, split, config))]
    mixed: list[Prompt] = []
    for i in range(count):
        mixed += [one[i], two[i]]
        if i % 4 == 0 and unseen:
            mixed.append(unseen.pop(0))
        if i % 8 == 0 and silent:
            mixed.append(silent.pop(0))
    return mixed + unseen + silent


def _off_screen(count: int, seed: int, split: str, config: Any) -> list[Any]:
    """Scenes of a visible object and an unseen bell; the object sounds in every other one."""
    from javis.world import is_held_out, scene_from_prompt

    scenes: list[Any] = []
    trial = seed
    while len(scenes) < count:
        scene = scene_from_prompt(_clauses(sounding=len(scenes) % 2 == 0), trial, config)
        trial += 1
        if split == "any" or is_held_out(scene) == (split == "held_out"):
            scenes.append(scene)
    return scenes


def _clauses(*, sounding: bool) -> list[dict[str, Any]]:
    from javis.world.vocabulary import ATTRIBUTES, BELL, RINGS

    seen = {**dict.fromkeys(ATTRIBUTES), "visible": True, "audible": sounding}
    if not sounding:
        seen["motion"] = "floats"
    return [seen, {**dict.fromkeys(ATTRIBUTES), "shape": BELL, "motion": RINGS, "visible": False, "audible": True}]
