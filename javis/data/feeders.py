"""Which feeder decodes the files of a manifest."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

from javis.data.feed import Feeder, FeedPlan
from javis.errors import UsageError

if TYPE_CHECKING:
    from javis.data.manifest import Manifest

Backend = Literal["auto", "dali", "pyav"]


def make_feeder(manifest: Manifest, plan: FeedPlan, backend: Backend = "auto") -> Feeder:
    """The feeder of that name; "auto": DALI where it is installed, with PyAV for the files it cannot decode there.

    Raises:
        UsageError: unknown or unavailable backend (what to install is said), or no clip fits the plan.
    """
    if backend not in ("auto", "dali", "pyav"):
        raise UsageError(f"there is no feeder {backend!r}; expected auto, dali or pyav")
    if backend == "dali" or (backend == "auto" and has_dali()):
        from javis.data.dali_feeder import DaliFeeder

        return DaliFeeder(manifest, plan, fallback=backend == "auto")
    from javis.data.pyav_feeder import PyAVFeeder

    return PyAVFeeder(manifest, plan)


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # nothing of that vendor
        return False
