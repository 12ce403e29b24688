"""A folder, or a place at any URL that fsspec knows: files are written whole or not at all."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from javis.data.places import is_url, open_bytes
from javis.errors import UsageError

CHUNK = 1 << 20


class Store:
    """Files below ``where``.

    A local file appears under its name when it is complete. At a URL it is made in a local temporary file and then
    handed over; object stores show it when it is complete.
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        self.where = os.fspath(where).rstrip("/")
        self.is_local = not is_url(self.where)
        if not self.is_local:
            try:
                from fsspec.core import url_to_fs

                self.fs, self.root = url_to_fs(self.where)
            except (ImportError, ValueError) as error:
                raise UsageError(f"cannot use {self.where}: {error}; install the package that it names") from None
        else:
            self.folder = Path(self.where).absolute()

    def url(self, name: str) -> str:
        """A URL of a file, for fsspec."""
        return (self.folder / name).as_uri() if self.is_local else f"{self.where}/{name}"

    def prepare(self) -> None:
        """Make the folder, and clear away what a killed process has left in it.

        Raises:
            UsageError: it cannot be written.
        """
        from javis.media import check_writable, remove_leftovers

        if self.is_local:
            check_writable(self.folder / ".probe.tmp")
            remove_leftovers(self.folder)
        else:
            self.fs.makedirs(self.root, exist_ok=True)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A binary file that becomes ``name`` at the end, unless an exception comes first."""
        from javis.media import atomic_file

        if self.is_local:
            with atomic_file(self.folder / name) as temporary, temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # the name must not outlive the bytes in a power cut
            return
        with tempfile.NamedTemporaryFile(suffix=Path(name).suffix) as local:
            yield local
            local.flush()
            self.fs.put_file(local.name, f"{self.root}/{name}")

    def write_json(self, name: str, value: Any) -> None:
        """Write a json file, whole or not at all."""
        with self.writing(name) as file:
            file.write((json.dumps(value, indent=None, sort_keys=True) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in a json file; None if there is no such file, or something else in it."""
        try:
            with self.reading(name) as file:
                found = json.loads(file.read())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Any]:
        """A binary file that can be read and searched."""
        if self.is_local:
            with (self.folder / name).open("rb") as file:
                yield file
        else:
            with self.fs.open(f"{self.root}/{name}", "rb") as file:
                yield file

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        try:
            return (self.folder / name).stat().st_size if self.is_local else int(self.fs.size(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str | None:
        """Hex digest of a file; None if it is not there."""
        digest = hashlib.sha256()
        try:
            with self.reading(name) as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except FileNotFoundError:
            return None
        return digest.hexdigest()

    def names(self, pattern: str) -> list[str]:
        """File names that match a pattern, sorted; none if the place does not exist."""
        if self.is_local:
            return sorted(path.name for path in self.folder.glob(pattern))
        try:
            found = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(n for n in (str(path).rsplit("/", 1)[-1] for path in found) if fnmatch.fnmatch(n, pattern))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                (self.folder / name).unlink()
            else:
                self.fs.rm_file(f"{self.root}/{name}")

    # -- files elsewhere ----------------------------------------------------------------------------------------------

    @staticmethod
    def size_of(path: str) -> int:
        """Bytes of a local file or of what a URL names. Raises `OSError` or `UsageError` if there is none."""
        if not is_url(path):
            return os.stat(path).st_size
        with open_bytes(path) as file:
            return int(file.seek(0, os.SEEK_END))

    open_source = staticmethod(open_bytes)
