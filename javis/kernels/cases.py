"""Inputs of the ops, shared by tests and benchmarks, with the bytes they must move and the FLOPs they must do.

A case is one call: shapes, dtype, options; those of an op are in ``ops/<op>/cases.py``. Counts are of the algorithm,
not of an implementation: each input is read once and each output written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True, kw_only=True)
class OpCase(ABC):
    """One call of one op."""

    name: str  # unique among the cases of the op
    dtype: torch.dtype = torch.float32
    # False: the op has no backward pass (sampling only), so that none is tested or measured.
    differentiable: ClassVar[bool] = True

    @abstractmethod
    def inputs(self, *, seed: int = 0, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the op, random but the same for one seed."""

    @abstractmethod
    def bytes(self, *, backward: bool = False) -> int:
        """Bytes read and written by the forward pass, or by the backward pass alone."""

    @abstractmethod
    def flops(self, *, backward: bool = False) -> int:
        """Floating-point operations of the forward pass, or of the backward pass alone."""
