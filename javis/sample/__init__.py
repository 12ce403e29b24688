"""Sampling: the denoise loop."""

from javis.sample.euler import Denoiser, Tally, sample
from javis.sample.guidance import Guidance, GuidancePlan
from javis.sample.order import Order, parts, sample_in_order

__all__ = ["Denoiser", "Guidance", "GuidancePlan", "Order", "Tally", "parts", "sample", "sample_in_order"]
