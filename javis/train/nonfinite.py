"""Steps whose loss or gradient is not finite: skipped, counted, and after some in a row the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from javis.errors import FailedError

log = logging.getLogger("javis.train")


class NonFiniteGuard:
    """Counts such steps. All ranks ask it the same, so all end together.

    Attributes:
        total: skipped in this run, resumed parts included. in_a_row: since the last step that was taken.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.total, self.in_a_row = limit, 0, 0

    def skipped(self, step: int, what: str, batch: dict[str, Any], folder: Path, rank: int) -> None:
        """Count a step; ``what`` is said to be not finite.

        Raises:
            FailedError: it is the last one that is tolerated; this rank's batch is in ``folder``.
        """
        self.total += 1
        self.in_a_row += 1
        log.warning(
            "step %d skipped: %s not finite (%d in a row of at most %d, %d in all)",
            step, what, self.in_a_row, self.limit, self.total,
        )  # fmt: skip
        if self.in_a_row >= self.limit:
            name = save_batch(folder, step, rank, batch)
            raise FailedError(
                f"{what} not finite in {self.in_a_row} steps in a row, up to step {step}; the batch is in {name}; "
                "look at it, lower the learning rate, or go on from an earlier checkpoint"
            )

    def taken(self) -> None:
        """A step was finite."""
        self.in_a_row = 0


def save_batch(folder: Path, step: int, rank: int, batch: dict[str, Any]) -> Path:
    """Tensors of a batch as safetensors, nested ones by path, and all else as json beside them."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
        elif isinstance(value, dict):
            for key, below in value.items():
                walk(below, f"{path}.{key}" if path else str(key))
        elif isinstance(value, (list, tuple)) and any(isinstance(below, Tensor) for below in value):
            for i, below in enumerate(value):
                walk(below, f"{path}.{i}")
        else:
            others[path] = repr(value)

    walk(batch, "")
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"step_{step:07d}_rank_{rank}.safetensors"
    save_file(tensors, name)
    name.with_suffix(".json").write_text(json.dumps(others, indent=1) + "\n", encoding="utf-8")
    return name


__all__ = ["NonFiniteGuard", "save_batch"]
