"""Sampling: the denoise loop."""

from javis.sample.euler import Guidance, sample
from javis.sample.order import Order, sample_in_order

__all__ = ["Guidance", "Order", "sample", "sample_in_order"]
