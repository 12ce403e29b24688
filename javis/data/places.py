"""Where bytes are: local paths, and URLs that fsspec knows."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from javis.errors import UsageError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: "C://" is a drive


def is_url(path: str) -> bool:
    """Whether ``path`` names something for fsspec and not a local file."""
    return _URL.match(path) is not None


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[Any]:
    """A seekable binary file of a local path or an fsspec URL.

    Raises:
        UsageError: fsspec, or what it needs for this kind of URL, is not installed.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    try:
        import fsspec

        opened = fsspec.open(path, "rb")
    except (ImportError, ValueError) as error:
        raise UsageError(f"cannot open {path}: {error}; install 'javis[train]' and the package it names") from None
    with opened as file:
        yield file
