"""Training state on disk: safetensors and json only, written so that a kill at any moment loses nothing finished."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim


def flatten_optimizer(optimizer: optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Optimizer state as ``<parameter name>/<key>`` tensors; ``names`` in the order of the parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}


def restore_optimizer(optimizer: optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`flatten_optimizer`."""
    position = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        state.setdefault(position[name], {})[key] = value
    full = optimizer.state_dict()
    full["state"] = state
    optimizer.load_state_dict(full)


def save_state(
    folder: Path, step: int, groups: dict[str, dict[str, Tensor]], extra: dict[str, Any], *, keep: int = 2
) -> None:
    """Write ``step_<n>.safetensors`` and then point ``state.json`` to it; older files beyond ``keep`` are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{step:07d}.safetensors"
    tensors = {f"{group}|{key}": v.detach().contiguous() for group, d in groups.items() for key, v in d.items()}
    save_file(tensors, folder / (name + ".tmp"))
    os.replace(folder / (name + ".tmp"), folder / name)
    pointer = folder / "state.json.tmp"
    pointer.write_text(json.dumps({"step": step, "file": name, **extra}))
    os.replace(pointer, folder / "state.json")
    for old in sorted(folder.glob("step_*.safetensors"))[:-keep]:
        old.unlink()


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """The newest finished state, or None."""
    pointer = folder / "state.json"
    if not pointer.exists():
        return None
    state: dict[str, Any] = json.loads(pointer.read_text())
    groups: dict[str, dict[str, Tensor]] = {}
    for path, value in load_file(folder / state["file"]).items():
        group, key = path.split("|", 1)
        groups.setdefault(group, {})[key] = value
    return state, groups


class Ema:
    """Exponential moving average of a module's parameters, with a warm-up so that early weights fade fast."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in module.state_dict().items()}

    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay)
