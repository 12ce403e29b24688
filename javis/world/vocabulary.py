"""Words of the world: attribute classes, the vocabulary, and the combinations held out of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
MATERIALS = ("wooden", "metal", "glass")
SHAPES = ("ball", "box", "triangle", "star")
STRIKING = ("bounces", "swings", "knocks")  # struck objects: their material is heard
MOTIONS = (*STRIKING, "flashes", "floats")  # flashes beep, whatever they are made of; floats are silent
SIDES = ("left", "middle", "right")
TIMBRES = (*MATERIALS, "electronic")
BELL = "bell"
RINGS = "rings"

PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}

VOCABULARY: tuple[str, ...] = (
    "a", "an", "the", "and", "on", "in", "unseen", "silently",
    *SIZES, *COLOURS, *MATERIALS, *SHAPES, BELL, *MOTIONS, RINGS, *SIDES,
)  # fmt: skip
"""Every word a caption can contain."""

ATTRIBUTES = ("size", "colour", "material", "shape", "motion", "side", "visible", "audible")


def held_out_combination(colour: str, shape: str, motion: str) -> bool:
    """True for the fixed (colour, shape, motion) combinations that no training scene contains.

    Rule: with each class numbered in the order of ``COLOURS``, ``SHAPES``, ``MOTIONS``, the combination is held out
    iff (colour + 2 * shape + 3 * motion) mod 10 == 4. That is 12 of 120, and every class appears in training.
    """
    index = COLOURS.index(colour) + 2 * SHAPES.index(shape) + 3 * MOTIONS.index(motion)
    return index % 10 == 4


def held_out_combinations() -> tuple[tuple[str, str, str], ...]:
    """All held-out (colour, shape, motion) triples."""
    return tuple(
        (colour, shape, motion)
        for motion in MOTIONS
        for shape in SHAPES
        for colour in COLOURS
        if held_out_combination(colour, shape, motion)
    )


def clause_is_held_out(clause: Mapping[str, Any]) -> bool:
    """``held_out_combination`` of one clause; False while its colour, shape or motion is not given."""
    colour, shape, motion = clause.get("colour"), clause.get("shape"), clause.get("motion")
    if colour is None or shape is None or motion is None or shape == BELL:
        return False
    return held_out_combination(colour, shape, motion)
