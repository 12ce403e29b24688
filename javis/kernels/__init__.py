"""Ops of the diffusion transformer with interchangeable backends.

Each op is one function whose docstring is its contract, and runs on the fastest backend that can take the call, on the
one named by ``backend=``. ``use_backend(...)`` and the environment variable ``JAVIS_BACKEND`` name one for all ops that
have it. The model does not import this package; it is handed the ops: ``ModelOps(**fused_ops())``.

Read next: backend.py (the choice), ops/ada_layer_norm/api.py (an op from contract to kernel), registry.py (all ops).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from javis.kernels.backend import Backend, use_backend
from javis.kernels.registry import NAMES, OPS, fused_ops

__all__ = ["OPS", "Backend", "fused_ops", "use_backend", *NAMES]


def __getattr__(name: str) -> Callable[..., Any]:
    """``from javis.kernels import <op>`` for every op of the registry."""
    if name in OPS:
        return OPS[name].function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its ops are {', '.join(OPS)}")
