"""Which reads of a piece of code find their data in a cache, by the distance of reuse (Mattson et al., 1970).

A tensor is taken to be in the cache if all that was read and written since it was last used, and itself, fit in there:
the rule of a cache that drops what was used least recently.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# Bytes that a core, or a GPU, keeps close by: the second level of current processors (1 to 2 MiB), and of an A100.
CACHE = {"cpu": 2 << 20, "cuda": 40 << 20}


class CachedReads:
    """Watches calls one after the other; tensors may have no values (the meta device).

    Args:
        size: bytes of the cache.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._moved = 0  # bytes so far
        self._used: dict[int, int] = {}  # storage -> bytes that had been moved when it was last used

    def share(self, taken: Sequence[Tensor]) -> float:
        """Share of the bytes of a call's inputs that it finds in the cache, 0..1; 0 without inputs."""
        found = total = 0
        for tensor in taken:
            last = self._used.get(_key(tensor))
            total += tensor.nbytes
            if last is not None and self._moved - last + tensor.nbytes <= self.size:
                found += tensor.nbytes
        return found / total if total else 0.0

    def use(self, tensors: Sequence[Tensor], moved: int) -> None:
        """A call has read or written these tensors, ``moved`` bytes in all."""
        self._moved += moved
        for tensor in tensors:
            self._used[_key(tensor)] = self._moved

    def forget(self, storage: int) -> None:
        """The memory of a tensor was freed; its address may be given to another."""
        self._used.pop(storage, None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
