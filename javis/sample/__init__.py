"""Sampling: the denoise loop."""

from javis.sample.euler import Guidance, sample

__all__ = ["Guidance", "sample"]
