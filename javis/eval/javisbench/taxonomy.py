"""The taxonomy of JavisBench: 5 aspects with 19 categories (JavisDiT, arXiv 2503.23377, section 4.1).

In the official CSV the column ``cat0_ind`` holds, for each prompt, the numbers of its categories in aspect 0, joined by
commas; ``cat4_ind`` those of aspect 4. The names behind the numbers are in a file of the official repository,
``eval/javisbench/configs/category.json``; `read_taxonomy` reads it. Without it the order of the paper's table is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from javis.errors import UsageError


@dataclass(frozen=True)
class Aspect:
    """One way to divide the prompts. ``categories`` are numbered by their place."""

    name: str
    categories: tuple[str, ...]


Taxonomy = tuple[Aspect, ...]

OFFICIAL: Taxonomy = (
    Aspect(
        "Event Scenario",
        ("Natural Scenario", "Urban Scenario", "Living Scenario", "Industrial Scenario", "Virtual Scenario"),
    ),
    Aspect("Visual Style", ("Camera Shooting", "2D-Animate", "3D-Animate")),
    Aspect(
        "Sound Type",
        ("Ambient Sounds", "Biological Sounds", "Mechanical Sounds", "Musical Sounds", "Speech Sounds"),
    ),
    Aspect("Spatial Composition", ("Single Subject", "Multiple Subject", "Off-screen Sound")),
    Aspect("Temporal Composition", ("Single Event", "Sequential Events", "Simultaneous Events")),
)


def column(aspect: int) -> str:
    """Name of the CSV column that holds the categories of an aspect."""
    return f"cat{aspect}_ind"


def read_taxonomy(path: Path) -> Taxonomy:
    """Aspects and categories of the official ``category.json``: ``[{"aspect": .., "categories": [{"title": ..}]}]``.

    Raises:
        UsageError: not readable, or of another form.
    """
    try:
        aspects = json.loads(path.read_text(encoding="utf-8"))
        found = tuple(
            Aspect(str(aspect["aspect"]), tuple(str(category["title"]) for category in aspect["categories"]))
            for aspect in aspects
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"cannot read categories from {path}: {error!r}; expected the official category.json, a list of "
            '{"aspect": name, "categories": [{"title": name}]}'
        ) from None
    if not found or not all(aspect.categories for aspect in found):
        raise UsageError(f"{path} names no aspect, or one without categories; expected the official category.json")
    return found
