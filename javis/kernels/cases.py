"""Inputs of the ops, shared by tests and benchmarks, with the bytes they must move and the FLOPs they must do.

A case is one call: shapes, dtype, options; those of an op are in ``ops/<op>/cases.py``. Counts are of the algorithm,
not of an implementation: each input is read once and each output written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

# Fields of cases that count samples or tokens: with fewer of them it is the same kernel on less.
_COUNTS = ("batch", "frames", "places", "tokens", "video", "audio")


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

    def smaller(self, *, flops: float, bytes: float) -> OpCase:
        """This call with fewer tokens, until its forward pass needs at most so many FLOPs and bytes.

        The largest count is halved again and again; widths, heads and the number of prior tokens stay.
        """
        case: OpCase = self
        while case.flops() > flops or case.bytes() > bytes:
            counts = {name: getattr(case, name) for name in _COUNTS if isinstance(getattr(case, name, None), int)}
            largest = max(counts, key=lambda name: counts[name], default=None)
            if largest is None or counts[largest] <= 1:
                break
            case = replace(case, **{largest: counts[largest] // 2})
        return case
