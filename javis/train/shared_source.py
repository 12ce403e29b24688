"""Batches for processes that share the tokens of the same clips: the first of them reads, the others are sent it.

So clips are decoded and encoded once, and a file that one process cannot read leaves no two with other batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from javis.errors import FailedError, UsageError

if TYPE_CHECKING:
    from javis.train.engine import BatchSource

_ERRORS: dict[str, type[Exception]] = {"failed": FailedError, "usage": UsageError}


class SharedSource:
    """A source of which the first rank of ``group`` makes the batches of all of it.

    Args:
        source: every rank has one, those of the others are not asked. device: where batches are wanted.

    Raises:
        FailedError, UsageError: what the first one raises, every one does.
    """

    def __init__(self, source: BatchSource, group: ProcessGroup, device: torch.device) -> None:
        self.source, self.group, self.device = source, group, device
        self.leads = group.rank() == 0

    def next(self) -> dict[str, Any]:
        tensors: list[Tensor] = []
        box: list[Any] = [None]
        if self.leads:
            try:
                box = [("batch", _take_out(self.source.next(), tensors))]
            except (FailedError, UsageError) as error:
                box = [("usage" if isinstance(error, UsageError) else "failed", str(error))]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        kind, told = box[0]
        if kind != "batch":
            raise _ERRORS[kind](told)
        batch: dict[str, Any] = _put_back(told, iter(tensors) if self.leads else None, self._exchanged)
        return batch

    def _exchanged(self, shape: tuple[int, ...], dtype: torch.dtype, own: Tensor | None) -> Tensor:
        """A tensor of the first rank, on every rank. As bytes: not every backend knows every dtype."""
        if own is None:
            own = torch.empty(shape, dtype=dtype, device=self.device)
        own = own.to(self.device).contiguous()
        if own.numel():
            dist.broadcast(own.view(-1).view(torch.uint8), group=self.group, group_src=0)
        return own

    def state_dict(self) -> dict[str, Any]:
        """Of the source that is read; nothing elsewhere."""
        return self.source.state_dict() if self.leads else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.leads:
            self.source.load_state_dict(state)


class _Place:
    """Where a tensor belongs."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` with a `_Place` for every tensor; they are appended to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return _Place(value)
    if isinstance(value, dict):
        return {key: _take_out(below, tensors) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_take_out(below, tensors) for below in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _put_back(value: Any, tensors: Any, exchanged: Any) -> Any:
    """Inverse of `_take_out`, in the same order on every rank; ``tensors`` are those of the rank that has them."""
    if isinstance(value, _Place):
        return exchanged(value.shape, value.dtype, None if tensors is None else next(tensors))
    if isinstance(value, dict):
        return {key: _put_back(below, tensors, exchanged) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_put_back(below, tensors, exchanged) for below in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


__all__ = ["SharedSource"]
