"""Which implementation of an op runs: the fastest that can, or the one asked for, or an error that says why not.

Every op owns an ordered table of checks, fastest backend first and the reference last; where calls of that shape were
measured on this class of device, the measured order (choices.py) goes before it. A check looks at the arguments
of one call and returns ``None`` (can run) or the reason why it cannot.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from javis.errors import UsageError
from javis.kernels import choices, onednn
from javis.kernels.backend_names import Backend

__all__ = ["Backend", "Check", "select", "use_backend", "why_not", "why_not_auto"]

logger = logging.getLogger(__name__)

Check = Callable[..., "str | None"]


# A plain module attribute, not a ContextVar: torch.compile guards on it, so that compiled code follows use_backend.
# Read from the environment once, when the package is imported.
_default: Backend = Backend.parse(os.environ.get("JAVIS_BACKEND") or "auto")
# Backends that refuse every tensor of a device, or that auto never takes there (`why_not_auto`). Their checks need not
# be asked in every call, which on small tensors takes as long as the op.
_ELSEWHERE: dict[str, frozenset[Backend]] = {
    "cpu": frozenset({Backend.CUDA, Backend.TRITON, Backend.FLASH_ATTN}),
    "cuda": frozenset({Backend.CPU, Backend.ONEDNN}),
}
_NOWHERE: frozenset[Backend] = frozenset()
_explained: set[tuple[str, Backend]] = set()
_left_alone: set[tuple[str, Backend]] = set()


@contextmanager
def use_backend(backend: Backend | str) -> Iterator[None]:
    """Run the ops called inside with ``backend``, unless a call names another one.

    Holds for the whole process, other threads included. An op that has no such implementation at all is left at
    ``auto`` and says so once in the log: no backend has every op. Raises UsageError for an unknown name; a backend that
    the op has and that cannot run a call raises there.
    """
    global _default
    previous, _default = _default, Backend.parse(backend)
    try:
        yield
    finally:
        _default = previous


def why_not(checks: Mapping[Backend, Check], backend: Backend, *args: object) -> str | None:
    """Why ``backend`` cannot run this call, or None."""
    if backend not in checks:
        return "this op has no such implementation"
    return checks[backend](*args)


def why_not_auto(checks: Mapping[Backend, Check], backend: Backend, *args: object) -> str | None:
    """Why ``auto`` would pass ``backend`` by for this call, or None.

    That it cannot run; or that it is a Triton kernel and the first tensor is on a CPU: there it could run only in
    Triton's interpreter, which is there to prove a kernel and thousands of times too slow to use; or that it is a
    product on oneDNN that PyTorch computes as fast by itself on this processor; or that the op's check has an attribute
    ``why_not_auto``, a check of its own for this, which says so.
    """
    reason = why_not(checks, backend, *args)
    if reason is None and hasattr(checks[backend], "why_not_auto"):
        return checks[backend].why_not_auto(*args)  # type: ignore[attr-defined, no-any-return]
    if reason is None and backend in (Backend.TRITON, Backend.ONEDNN):
        first = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
        if first is not None and first.device.type == "cpu":
            if backend is Backend.TRITON:
                return "on a CPU only in Triton's interpreter, which auto never takes"
            return onednn.why_not_auto(first)
    return reason


def select(op: str, checks: Mapping[Backend, Check], *args: object, backend: Backend | str) -> Backend:
    """The backend for one call.

    Args:
        op: name of the op, for messages.
        checks: fastest first, as far as nothing was measured; the last one accepts every valid call.
        args: what the checks look at.
        backend: a name, or ``"auto"``: then ``use_backend`` or ``JAVIS_BACKEND`` decides if the op has that backend,
            and after them the table.

    Raises:
        UsageError: the named backend is unknown or cannot run this call, or the table of measured choices is unusable.
        ValueError: the tensors are on different devices.
    """
    wanted = Backend.parse(backend)
    device = _one_device(op, args)
    if wanted is Backend.AUTO:
        wanted = _default
        if wanted is not Backend.AUTO and wanted not in checks:
            _say_once(op, wanted)
            wanted = Backend.AUTO
    if wanted is not Backend.AUTO:
        reason = why_not(checks, wanted, *args)
        if reason is not None:
            others = ", ".join(candidate.value for candidate in checks if candidate is not wanted)
            raise UsageError(
                f"{op}: backend {wanted.value!r} cannot run this call: {reason}; use backend='auto' or one of {others}"
            )
        return wanted
    order = choices.order(op, checks, args)
    elsewhere = _NOWHERE if device is None else _ELSEWHERE.get(device.type, _NOWHERE)
    for candidate in order:
        if candidate not in elsewhere and why_not_auto(checks, candidate, *args) is None:
            if not torch.compiler.is_compiling():  # a logger call would break the graph
                _explain_once(op, candidate, checks, order, args)
            return candidate
    raise AssertionError(f"{op}: the reference must accept every valid call")


def _one_device(op: str, args: tuple[object, ...]) -> torch.device | None:
    """The device of all tensors. Those of two are an error of the call: no backend takes them.

    A CPU scalar goes everywhere; with nothing else there is no device (None).
    """
    first: torch.Tensor | None = None
    for arg in args:
        if isinstance(arg, torch.Tensor) and (arg.ndim > 0 or arg.device.type != "cpu"):
            if first is not None and arg.device != first.device:
                shape = tuple(arg.shape)
                raise ValueError(
                    f"{op}: expected all tensors on {first.device} like the first, got {shape} on {arg.device}"
                )
            first = arg if first is None else first
    return None if first is None else first.device


def _say_once(op: str, wanted: Backend) -> None:
    if not torch.compiler.is_compiling() and (op, wanted) not in _left_alone:
        _left_alone.add((op, wanted))
        logger.info("%s: has no %s implementation, so that default leaves it at auto", op, wanted.value)


def _explain_once(
    op: str, chosen: Backend, checks: Mapping[Backend, Check], order: Sequence[Backend], args: tuple[object, ...]
) -> None:
    if (op, chosen) in _explained:
        return
    _explained.add((op, chosen))
    skipped = []
    for candidate in order:
        if candidate is chosen:
            break
        skipped.append(f"{candidate.value} ({why_not_auto(checks, candidate, *args)})")
    logger.info("%s: auto runs %s%s", op, chosen.value, f"; not {', '.join(skipped)}" if skipped else "")
