"""The peak of what tensors hold, from the dispatcher: independent of the counts in javis/decode/work.py."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """``peak``: the most bytes that tensors made in the context held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value, made in [(v, False) for v in tree_leaves((args, kwargs))] + [(v, True) for v in tree_leaves(out)]:
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes() if made else 0
                self.now += self.live[storage._cdata]
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key)
