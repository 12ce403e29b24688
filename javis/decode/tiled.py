"""The image decoder in bands of rows, for cards on which a whole frame does not fit.

The usual way cuts the latents into overlapping tiles, decodes each as if it were a picture of its own and blends the
seams. Each tile then has its own group-norm statistics and its own attention, so that the result differs from the
untiled one everywhere, not only at the seams, and brightness may jump between tiles.

Here all bands go through the network together, one convolution at a time. The activations between two convolutions are
kept whole (`storage="device"`, or `"host"`: in main memory), and only what a convolution needs at a time is made for a
band: normalised rows with one neighbour row on each side, the result, which also adds to the statistics of the
next group norm. Each output row is computed once, from exactly the rows that the untiled convolution reads, with the
statistics of the whole frame. So tiled equals untiled up to the rounding of the statistics: no overlap, no seams. The
price is the traffic of the activations, and with `storage="host"` the bus to the card.

Attention is over all places of the smallest level (1/64 of the pixels) and runs whole, with few queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from javis.decode.image import Attention, Conv, Norm, Output, ResBlock, Step, Upsample
from javis.decode.ops import attention, fused_upsample_rows, plain_upsample_rows

Storage = Literal["device", "host"]
QUERIES = 2048  # of one attention call


class Statistics:
    """Mean and variance of the groups of a frame [1, C, H, W], joined from bands (Chan et al.), in float64."""

    def __init__(self, groups: int) -> None:
        self.groups, self.count = groups, 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0  # sum of squared deviations from the mean

    def add(self, x: Tensor) -> None:
        """Take in a band [1, C, rows, W]."""
        wide = x.unflatten(1, (self.groups, -1)).to(torch.promote_types(x.dtype, torch.float32))
        axes, count = (0, 2, 3, 4), x.numel() // self.groups
        variance, mean = torch.var_mean(wide, axes, correction=0)
        variance, mean = variance.double(), mean.double()
        delta, total = mean - self.mean, self.count + count
        self.squares = self.squares + variance * count + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def affine(self, norm: Norm, dtype: torch.dtype) -> Affine:
        """The norm with these statistics, as three tensors [1, C, 1, 1] of ``dtype``."""
        assert isinstance(self.mean, Tensor) and isinstance(self.squares, Tensor), "no band was added"
        rstd = torch.rsqrt(self.squares / self.count + norm.eps)
        repeats = len(norm.weight) // self.groups
        mean, rstd = self.mean.repeat_interleave(repeats), rstd.repeat_interleave(repeats)
        parts = (mean, rstd * norm.weight.double(), norm.bias.double())
        return Affine(*(part.to(dtype).view(1, -1, 1, 1) for part in parts))


class Affine(NamedTuple):
    """(x - mean) * factor + bias, channel by channel."""

    mean: Tensor
    factor: Tensor
    bias: Tensor

    def __call__(self, x: Tensor, *, silu: bool = True) -> Tensor:
        """Computed in the dtype of the parts, rounded once to that of x."""
        y = (x.to(self.mean.dtype) - self.mean).mul_(self.factor).add_(self.bias)
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)


@dataclass
class Plane:
    """The activations of a whole frame [1, C, H, W], channels-last, and their statistics (None: nobody asks)."""

    values: Tensor
    statistics: Statistics | None

    @property
    def height(self) -> int:
        return self.values.shape[2]

    def norm(self, norm: Norm) -> Affine:
        """``norm`` of this plane."""
        assert self.statistics is not None, f"{self.values.shape[1]} channels in {norm.groups} groups"
        return self.statistics.affine(norm, torch.promote_types(self.values.dtype, torch.float32))


class BandedDecoder:
    """Decodes one frame at a time.

    Args:
        steps: of `javis.decode.image.prepare`; their weights are on the device that computes.
        rows: rows of a band; a picture of no more rows is one band.
        storage: where activations of more rows than that are kept: on the device, or in main memory.
    """

    def __init__(self, steps: list[Step], *, rows: int, storage: Storage = "device") -> None:
        if rows < 1:
            raise ValueError(f"a band has at least one row, got {rows}")
        first = steps[0]
        assert isinstance(first, Conv)
        self.steps, self.rows = steps, rows
        self.device, self.dtype = first.weight.device, first.weight.dtype
        self.host = storage == "host" and self.device.type != "cpu"
        self.groups = next(step.norm1.groups for step in steps if isinstance(step, ResBlock))

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Features [1, C, h, w] of the image VAE (not scaled) -> frame [1, 3, H, W], where the storage is."""
        if len(features) != 1:
            raise ValueError(f"bands are of one frame, got {len(features)}")
        x = Plane(features.to(self.device, self.dtype, memory_format=torch.channels_last), None)
        for step in self.steps:
            x = self._step(step, x)
        return x.values

    def _step(self, step: Step, x: Plane) -> Plane:
        if isinstance(step, Conv):
            return self._convolve(x, step)
        if isinstance(step, Output):
            return self._convolve(x, step.conv, x.norm(step.norm))
        if isinstance(step, Upsample):
            return self._upsample(x, step)
        if isinstance(step, Attention):
            return self._attend(x, step)
        h = self._convolve(x, step.conv1, x.norm(step.norm1))
        return self._second_half(step, x, h)

    def _convolve(self, x: Plane, conv: Conv, norm: Affine | None = None) -> Plane:
        """The convolution of x, or of silu(norm(x))."""
        return self._produce(x, len(conv.weight), lambda start, stop: self._convolve_rows(x, start, stop, conv, norm))

    def _second_half(self, block: ResBlock, x: Plane, h: Plane) -> Plane:
        """Shortcut of x + second convolution of h; written over x where the width allows it."""
        norm, shortcut = h.norm(block.norm2), block.shortcut

        def rows(start: int, stop: int) -> Tensor:
            y = self._convolve_rows(h, start, stop, block.conv2, norm)
            kept = self._rows(x, start, stop, 0)  # the rows that are written next, and no others
            return y.add_(kept if shortcut is None else F.conv2d(kept, shortcut.weight, shortcut.bias))

        return self._produce(x, len(block.conv2.weight), rows, into=x.values if shortcut is None else None)

    def _upsample(self, x: Plane, step: Upsample) -> Plane:
        run = fused_upsample_rows if step.fused else plain_upsample_rows
        channels = step.weight.shape[1] if step.fused else step.weight.shape[0]
        return self._produce(x, channels, lambda a, b: run(self._rows(x, a, b, 1), step.weight, step.bias), factor=2)

    def _attend(self, x: Plane, step: Attention) -> Plane:
        values = x.values.to(self.device)
        y = x.norm(step.norm)(values, silu=False)
        mixed = attention(y, step.qkv, step.out, block=QUERIES)
        del y
        return self._produce(x, values.shape[1], lambda a, b: values[:, :, a:b] + mixed[:, :, a:b], into=x.values)

    # -- bands --------------------------------------------------------------------------------------------------------

    def _produce(
        self,
        x: Plane,
        channels: int,
        make: Callable[[int, int], Tensor],
        *,
        into: Tensor | None = None,
        factor: int = 1,
    ) -> Plane:
        """A plane of ``factor`` times the size of x from ``make(start, stop)``, its rows for rows start..stop of x."""
        height, width = (factor * n for n in x.values.shape[2:])
        values = self._empty(channels, height, width) if into is None else into
        statistics = Statistics(self.groups) if channels % self.groups == 0 else None
        step = max(1, self.rows // factor)
        for start in range(0, x.height, step):
            stop = min(start + step, x.height)
            band = make(start, stop)
            if statistics is not None:
                statistics.add(band)
            values[:, :, factor * start : factor * stop].copy_(band)
            del band
        return Plane(values, statistics)

    def _empty(self, channels: int, height: int, width: int) -> Tensor:
        host = self.host and height > self.rows
        return torch.empty(
            (1, channels, height, width),
            dtype=self.dtype,
            device="cpu" if host else self.device,
            memory_format=torch.channels_last,
            pin_memory=host,
        )

    def _rows(self, x: Plane, start: int, stop: int, beyond: int, norm: Affine | None = None) -> Tensor:
        """Rows start - beyond .. stop + beyond on the device, normalised; zeros outside of the picture."""
        low, high = max(0, start - beyond), min(x.height, stop + beyond)
        values = x.values[:, :, low:high].to(self.device)
        if norm is not None:
            values = norm(values)
        missing = (low - (start - beyond), stop + beyond - high)
        return F.pad(values, (0, 0, *missing)) if any(missing) else values

    def _convolve_rows(self, x: Plane, start: int, stop: int, conv: Conv, norm: Affine | None) -> Tensor:
        beyond = conv.weight.shape[-1] // 2
        return F.conv2d(self._rows(x, start, stop, beyond, norm), conv.weight, conv.bias, padding=(0, beyond))
