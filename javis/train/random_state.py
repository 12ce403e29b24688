"""The generators of python, numpy and torch as json."""

from __future__ import annotations

import base64
import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def seed_everything(seed: int) -> None:
    """The three generators, and those of the GPUs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Json-able state of the generators of this process, that of its GPU included if it has one."""
    kind, numbers, interval = random.getstate()
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": [kind, list(numbers), interval],
        "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`; what the state of a GPU is missing for stays as it is."""
    kind, numbers, interval = state["python"]
    random.setstate((kind, tuple(numbers), interval))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """What runs inside, samples for instance, does not change what is drawn after it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


__all__ = ["kept_random_state", "random_state", "seed_everything", "set_random_state"]
