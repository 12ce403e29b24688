"""The names of the backends; a file of its own so that backend.py and choices.py can both know them."""

from __future__ import annotations

from enum import Enum

from javis.errors import UsageError


class Backend(str, Enum):
    """Implementations an op may have. Only ``AUTO`` falls through to another one."""

    AUTO = "auto"
    CUDA = "cuda"
    TRITON = "triton"
    CPU = "cpu"
    FLASH_ATTN = "flash_attn"
    SDPA = "sdpa"
    ONEDNN = "onednn"
    REFERENCE = "reference"

    @classmethod
    def parse(cls, name: Backend | str) -> Backend:
        """The backend called ``name``; raises UsageError with the list of names if there is none."""
        for backend in cls:
            if backend is name or backend.value == name:
                return backend
        raise UsageError(f"unknown backend {name!r}: expected one of {', '.join(b.value for b in cls)}")
