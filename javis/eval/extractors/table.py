"""Which networks there are, and which public files each needs."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What to put into the folder of a network; empty where nothing is needed."""

    put: str


TABLE: dict[str, Entry] = {
    "builtin": Entry(""),
}
