"""The model's ops with one backend wherever it can run, and a record of where it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from javis.doctor import _kinds
from javis.errors import UsageError
from javis.kernels.backend import Backend, use_backend, why_not
from javis.kernels.registry import MODEL_OPS, OPS, fused_ops
from javis.model.ops import ModelOps


def prefer(backend: Backend) -> tuple[ModelOps, Counter[str]]:
    """Ops that name ``backend`` in every call, and where it refuses (not built for that dtype or axis) take ``auto``.

    The counter says how often each op ran on it.
    """
    ran: Counter[str] = Counter()

    def choosing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if backend not in OPS[name].checks:
                return function(*args, **kwargs)
            try:
                with use_backend(backend):
                    result = function(*args, **kwargs)
            except UsageError:
                return function(*args, **kwargs)
            ran[name] += 1
            return result

        return call

    return ModelOps(**{name: choosing(name, function) for name, function in fused_ops().items()}), ran


def expected(backend: Backend) -> set[str]:
    """Ops of the model that ``backend`` can run here in float32, on at least one kind of call."""
    found = set()
    for name in set(MODEL_OPS) & set(OPS):
        for case in _kinds(OPS[name].cases(), torch.float32).values():
            args, kwargs = case.inputs()
            if why_not(OPS[name].checks, backend, *args, *kwargs.values()) is None:
                found.add(name)
    return found
