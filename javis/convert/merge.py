"""Two branches of one transformer: what a converted folder has, completed by another checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from javis.convert.read import Checkpoint, TensorInfo, WeightSource
from javis.errors import UsageError
from javis.model.checkpoint import to_official


class Official:
    """A converted transformer under official names (a :class:`WeightSource`)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self.folder, self.notes = checkpoint, checkpoint.folder, checkpoint.notes
        self.config: dict[str, Any] | None = None  # ours; the shapes tell what is needed
        names = checkpoint.names()
        # Values are passed through, so names serve as well as tensors.
        self._ours: dict[str, str] = to_official(dict(zip(names, names, strict=True)))  # type: ignore[arg-type,assignment]

    def names(self) -> list[str]:
        return list(self._ours)

    def info(self, name: str) -> TensorInfo:
        return self._checkpoint.info(self._ours[name])

    def get(self, name: str) -> Tensor:
        return self._checkpoint.get(self._ours[name])


class Merged:
    """Tensors of ``new``, and of ``old`` where ``new`` has none (a :class:`WeightSource`)."""

    def __init__(self, new: WeightSource, old: WeightSource) -> None:
        self._new, self._old = new, old
        self._from_new = set(new.names())
        self.config, self.folder = new.config, new.folder
        both = self._from_new & set(old.names())
        self.notes = [*new.notes, f"merged: {len(both)} tensors are in both, those of the source are taken"]

    def names(self) -> list[str]:
        return [*self._new.names(), *(n for n in self._old.names() if n not in self._from_new)]

    def _source(self, name: str) -> WeightSource:
        return self._new if name in self._from_new else self._old

    def info(self, name: str) -> TensorInfo:
        return self._source(name).info(name)

    def get(self, name: str) -> Tensor:
        return self._source(name).get(name)


def existing(folder: Path) -> Official:
    """The converted transformer in ``folder``.

    Raises:
        UsageError: there is none.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no {folder} to merge into; convert the other branch first")
    try:
        return Official(Checkpoint(folder))
    except KeyError as error:
        raise UsageError(f"{folder} is no converted transformer: {error.args[0]}; convert it anew") from error
