"""javis: fast joint audio-video generation (JavisDiT, arXiv 2503.23377).

``import javis`` is light: nothing heavy is loaded until a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from javis.pipeline import JavisPipeline as JavisPipeline

_LAZY = {"JavisPipeline": "javis.pipeline"}

__all__ = ["JavisPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'javis' has no attribute {name!r}")
