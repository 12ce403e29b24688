"""What was measured to be fastest, by class of device and shape of call: what ``auto`` knows beyond an op's own order.

``choices.json`` is data, written by ``python -m benchmarks.choices`` from the rows in benchmarks/results::

    {"format": 1, "measured": {device class: {op: {bucket: [backends, fastest first]}}}}

``auto`` goes through the measured order first and then through the op's table; a call with no measured one near it, or
a backend that cannot run it, changes nothing. ``JAVIS_CHOICES`` names another file, or ``none``; it is read at import.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import native
from javis.kernels.backend_names import Backend

if TYPE_CHECKING:
    from javis.kernels.backend import Check

TABLE = Path(__file__).with_name("choices.json")
FORMAT = 1
NEAR = 4  # octaves: a batch of one stands for one of two, and two frames of a clip for sixteen
# Device class -> op -> bucket -> names of backends, fastest first.
Measured = dict[str, dict[str, dict[str, tuple[str, ...]]]]

_CPU_CLASS = f"cpu-{native.cpu_isa() or 'plain'}"


def device_class(kind: str, index: int | None = None) -> str:
    """Machines that share measurements: ``sm_90`` for every GPU of that capability, ``cpu-avx512`` for CPUs."""
    if kind != "cuda":
        return _CPU_CLASS if kind == "cpu" else kind
    return _gpu_class(index)


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and Triton with it.
device_class._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _gpu_class(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _part(arg: object) -> str:
    if isinstance(arg, Tensor):
        *counts, width = arg.shape if arg.ndim else (1,)
        rounded = [1 << (count - 1).bit_length() if count > 1 else count for count in counts]
        return f"{str(arg.dtype).removeprefix('torch.')}{[*rounded, width]}".replace(" ", "")
    if arg is None:
        return "-"
    if isinstance(arg, Enum):
        return str(arg.value)
    if isinstance(arg, (bool, int, str)):
        return str(arg)
    return "+"  # a table (RoPE), a scale: which one does not matter


def bucket(args: Sequence[object]) -> str:
    """Calls that share a measurement: dtypes, and sizes rounded up to powers of two but for the last (the width).

    Training and inference are two buckets, since the best forward pass need not have the best backward pass.
    """
    trained = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    return " ".join(["training" if trained else "inference", *map(_part, args)])


def bucket_of(
    function: Callable[..., Any], checks: Mapping[Backend, Check], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """The bucket of one call of an op; None for a function that makes no choice.

    Nothing is computed: the choice of the backend is as far as the call gets.
    """
    assert isinstance(checks, dict)
    original = checks[Backend.REFERENCE]

    class Seen(Exception):
        pass

    def spy(*seen: object) -> str | None:
        raise Seen(bucket(seen))

    checks[Backend.REFERENCE] = spy
    try:
        function(*args, **kwargs, backend=Backend.REFERENCE)
    except Seen as seen:
        return str(seen.args[0])
    finally:
        checks[Backend.REFERENCE] = original
    return None


def parse(text: str, name: str) -> Measured:
    """The table in ``text``.

    Raises:
        UsageError: it is none; the message says where and why.
    """
    names = {backend.value for backend in Backend} - {Backend.AUTO.value}

    def fail(why: str) -> UsageError:
        return UsageError(
            f"{name} is no table of measured choices: {why}; write it anew with `python -m benchmarks.choices`, or do "
            "without it (JAVIS_CHOICES=none)"
        )

    try:
        table = json.loads(text)
    except ValueError as error:
        raise fail(f"it is not JSON ({error})") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise fail(f'expected an object with "format": {FORMAT}')
    if set(table) != {"format", "measured"} or not isinstance(table["measured"], dict):
        raise fail('expected "format" and "measured" and nothing else')
    measured: Measured = {}
    for kind, ops in table["measured"].items():
        if not isinstance(ops, dict) or not all(isinstance(buckets, dict) for buckets in ops.values()):
            raise fail(f"{kind!r} must hold one object of buckets for each op")
        measured[kind] = {op: {} for op in ops}
        for op, buckets in ops.items():
            for key, order in buckets.items():
                if not isinstance(order, list) or not order or len(set(map(str, order))) != len(order):
                    raise fail(f"{kind}, {op}, {key!r} must be a list of different backends, got {order!r}")
                unknown = [backend for backend in order if backend not in names]
                if unknown:
                    raise fail(f"{kind}, {op}, {key!r} names the unknown backend {unknown[0]!r}")
                measured[kind][op][key] = tuple(order)
    return measured


def _load() -> tuple[Measured, str | None]:
    """The table and, if it is unusable, why: said when it is needed, since the package must import without it."""
    wanted = os.environ.get("JAVIS_CHOICES") or str(TABLE)
    if wanted == "none":
        return {}, None
    try:
        return parse(Path(wanted).read_text(encoding="utf-8"), wanted), None
    except UsageError as error:
        return {}, str(error)
    except (OSError, UnicodeDecodeError) as error:
        return {}, f"JAVIS_CHOICES={wanted} cannot be read ({error}); expected a file, or none"


_measured, _problem = _load()
_found: dict[tuple[object, ...], tuple[Backend, ...]] = {}


def order(op: str, checks: Mapping[Backend, Check], args: Sequence[object]) -> Sequence[Backend]:
    """The backends of ``checks`` in the order in which ``auto`` tries them for this call.

    Measured is what was measured at the nearest sizes, at most `NEAR` octaves away. A look-up per shape: the result is
    remembered, and an op that nobody measured on this class of device costs two look-ups in dictionaries.

    Raises:
        UsageError: the table is unusable.
    """
    if _problem is not None:
        raise UsageError(_problem)
    if not _measured:
        return tuple(checks)
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
    if device is None or op not in _measured.get(device_class(device.type, device.index), {}):
        return tuple(checks)
    if torch.compiler.is_compiling():  # chosen once, while tracing: nothing to remember
        return _ordered(checks, names(device.type, device.index, op, bucket(args)))
    key = (op, device, torch.is_grad_enabled(), *map(_exactly, args))
    found = _found.get(key)
    if found is None:
        found = _found[key] = _ordered(checks, names(device.type, device.index, op, bucket(args)))
    return found


def names(kind: str, index: int | None, op: str, wanted: str) -> str:
    """Measured backends for calls of a bucket, joined by commas, from the nearest bucket; "" if none is near."""
    buckets = _measured[device_class(kind, index)][op]
    near = [(distance(wanted, other), other) for other in buckets]
    octaves, nearest = min(near, default=(math.inf, ""))
    return ",".join(buckets[nearest]) if octaves <= NEAR else ""


names._dynamo_marked_constant = True  # type: ignore[attr-defined]


def distance(one: str, other: str) -> float:
    """Octaves between two buckets: doublings of sizes, of the tensor where they are most; infinite for other calls."""
    first, second = one.split(" "), other.split(" ")
    if len(first) != len(second):
        return math.inf
    most = 0.0
    for a, b in zip(first, second, strict=True):
        if a == b:
            continue
        (kind, sizes), (other_kind, other_sizes) = (part.rstrip("]").partition("[")[::2] for part in (a, b))
        counts, others = sizes.split(","), other_sizes.split(",")
        if kind != other_kind or not sizes or len(counts) != len(others) or counts[-1] != others[-1]:
            return math.inf
        pairs = [(int(x), int(y)) for x, y in zip(counts[:-1], others[:-1], strict=True)]
        if any((x == 0) != (y == 0) for x, y in pairs):
            return math.inf
        most = max(most, sum(abs(math.log2(x / y)) for x, y in pairs if x))
    return most


def _ordered(checks: Mapping[Backend, Check], measured: str) -> tuple[Backend, ...]:
    first = [backend for name in measured.split(",") for backend in checks if backend.value == name]
    return (*first, *(backend for backend in checks if backend not in first))


def _exactly(arg: object) -> object:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.shape, arg.requires_grad
    return arg if isinstance(arg, (bool, int, str)) else arg is None
