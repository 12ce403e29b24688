"""One call of an operation: its work, and how to run it on inputs of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["matmul", "conv", "attention", "other"]
KINDS: tuple[Kind, ...] = ("matmul", "conv", "attention", "other")


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the memory behind it: a value that is expanded over an axis is read from one place."""
        values = math.prod(n for n, step in zip(self.shape, self.stride, strict=True) if step) if self.shape else 1
        return 0 if 0 in self.shape else values * self.dtype.itemsize

    def tensor(self, device: str) -> Tensor:
        """Random values (zeros for whole numbers, which are indices)."""
        reach = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        length = 0 if 0 in self.shape else reach
        if self.dtype.is_floating_point:
            return torch.randn(length, device=device).to(self.dtype).as_strided(self.shape, self.stride)
        return torch.zeros(length, device=device, dtype=self.dtype).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Call:
    """Equal calls of one operation. FLOPs and bytes are those of one of them.

    ``cached``: share of their inputs, 0..1, that lies in a cache when they begin (`javis.cached_reads`).
    """

    kind: Kind
    name: str
    flops: int
    bytes: int
    count: int
    ready: Callable[[str], Callable[[], object]]  # device -> the call itself, on inputs of its own
    cached: float = 0.0
