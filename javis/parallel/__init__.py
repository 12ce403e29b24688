"""One clip on several devices: sequence parallel and guidance parallel. See docs/pipeline.md, "Several devices"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from javis.parallel.ranks import Rank, Share, make_mesh, rank_from_env

if TYPE_CHECKING:
    from javis.parallel.model import ParallelJavisDiT

__all__ = ["ParallelJavisDiT", "Rank", "Share", "make_mesh", "rank_from_env"]


def __getattr__(name: str) -> Any:
    if name != "ParallelJavisDiT":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from javis.parallel.model import ParallelJavisDiT  # loads torch, which errors in arguments need not wait for

    return ParallelJavisDiT
