"""Memory in which a write outside shows: every tensor that is allocated lies between two borders of known bytes.

The allocations of C++ are replaced as well as those of Python, since both go through PyTorch's dispatcher. Results of
PyTorch's own products and sums do not: ``Borders.place`` puts a tensor that is handed to a kernel between borders.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

BORDER = 1 << 16  # bytes on either side: a tile of 128 rows of 128 float32 values
MARK, UNWRITTEN = 0xA5, 0xFF  # UNWRITTEN is NaN in every floating-point type
ALIGNMENT = 64  # as PyTorch allocates on CPU


class Borders:
    """What was allocated, to be checked afterwards."""

    def __init__(self) -> None:
        self._found: list[tuple[np.ndarray[Any, Any], int, int, str]] = []  # buffer, first byte, bytes, what it is

    def empty(self, size: Sequence[int], dtype: torch.dtype | None = None, **_: object) -> Tensor:
        """A dense tensor full of NaN; no view, so that autograd takes it for any other."""
        dtype = dtype or torch.get_default_dtype()
        values = int(np.prod(size, dtype=np.int64))
        count = max(values, 1) * dtype.itemsize
        buffer = np.full(2 * BORDER + count + ALIGNMENT, MARK, np.uint8)
        start = BORDER + -(buffer.ctypes.data + BORDER) % ALIGNMENT
        buffer[start : start + count] = UNWRITTEN
        tensor = torch.frombuffer(buffer, dtype=dtype, count=max(values, 1), offset=start)
        if values == 0:  # PyTorch's own ops may resize it
            return tensor.set_(torch.UntypedStorage(0), 0, tuple(size))  # type: ignore[arg-type]
        self._found.append((buffer, start, count, f"{dtype} {list(size)}"))
        return tensor.resize_(size)

    def empty_strided(self, size: Sequence[int], stride: Sequence[int], **kwargs: Any) -> Tensor:
        extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
        return self.empty([extent], **kwargs).as_strided_(size, stride)

    def place(self, tensor: Tensor) -> Tensor:
        """A dense copy between borders."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this tensor was allocated between borders."""
        return any(0 <= tensor.data_ptr() - b.ctypes.data - start < n for b, start, n, _ in self._found)

    def touched(self) -> list[str]:
        """The tensors outside which something was written, and how far from them."""
        found = []
        for buffer, start, count, what in self._found:
            outside = np.flatnonzero(buffer != MARK)
            outside = outside[(outside < start) | (outside >= start + count)] - start
            if outside.size:
                found.append(f"{what} of {count} bytes: {outside.size} written at {outside[0]} to {outside[-1]}")
        return found


@contextmanager
def guarded() -> Iterator[Borders]:
    """Within it CPU tensors are allocated between borders."""
    borders = Borders()
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="[^$]*Overriding a previously registered kernel")
            for name, function in (
                ("empty.memory_format", borders.empty),
                ("empty_strided", borders.empty_strided),
            ):
                library.impl(name, function, "CPU", allow_override=True)
        yield borders
    finally:
        library._destroy()
