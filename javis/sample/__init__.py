"""Sampling: the denoise loop."""

from javis.sample.euler import Denoiser, Guidance, sample
from javis.sample.order import Order, sample_in_order

__all__ = ["Denoiser", "Guidance", "Order", "sample", "sample_in_order"]
