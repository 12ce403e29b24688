"""How fast a machine is at each kind of call: given, read from measured rows, or measured now.

A call takes the longer of its arithmetic and its memory traffic (`Rates.seconds`). Three sources:

- given: TFLOP/s and GB/s by argument;
- rows: the large matrix product and the copy that ``javis bench kernels`` timed on that device
  (``benchmarks/results/*.jsonl``), and how near to that roofline whole stages came (rows of
  ``benchmarks/end_to_end.py``);
- measured: the heaviest calls of each stage, run on this machine with random inputs (:func:`measure`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from javis.calls import KINDS, Call, Kind

RESULTS = Path("benchmarks/results")
_LARGE_MB = 10.0  # copies of less may stay in a cache
_MOST_TURNS = 50
_MODULE_CALLS = 40  # of the tiny modules
_PER_NAME = 4  # calls of each operation and stage that are measured in any case
_COVERED = 0.95  # of the time that a stage should take lies in calls that are measured
_QUICK = {"cpu": 1e9, "cuda": 1e12}  # FLOPs of a call that is measured for the sake of that
_LONGEST = {"cpu": 2e10, "cuda": 1e12}  # FLOPs of a call that is still measured
_LARGEST = 2e9  # and its bytes
_CACHE = {"cpu": 16 << 20, "cuda": 128 << 20}  # bytes that empty the caches that a core, or a GPU, has for itself


@dataclass(frozen=True)
class Rates:
    """Speed of a device.

    Attributes:
        flops: per second, by kind of call ("other" has none).
        bytes: per second, read and written together, of calls that are no products.
        copy: bytes per second that products are held to as well; infinite where their own speed was measured.
        call: seconds that each call takes besides.
        share: how near to this roofline whole stages came on this device, 0..1; 1 for those that are not in it.
        named: FLOPs per second (bytes, for what is no product) of single operations, where they were measured.
        exact: seconds of single calls, by their ``ready``, where those very calls were measured.
        source: where the figures come from.
    """

    flops: Mapping[Kind, float]
    bytes: float
    copy: float = float("inf")
    call: float = 0.0
    share: Mapping[str, float] = field(default_factory=dict)
    named: Mapping[str, float] = field(default_factory=dict)
    exact: Mapping[Any, float] = field(default_factory=dict)
    source: str = "given"

    def seconds(self, calls: Iterable[Call], stage: str = "") -> float:
        """Time of these calls one after the other."""
        return sum(call.count * self.once(call) for call in calls) / self.share.get(stage, 1.0)

    def once(self, call: Call) -> float:
        """Time of one of the calls."""
        if call.ready in self.exact:
            return self.call + self.exact[call.ready]
        if call.name in self.named:
            speed = self.named[call.name]
            if call.kind == "other":
                return self.call + call.bytes / speed
            return self.call + max(call.flops / speed, call.bytes / self.copy)
        if call.kind == "other":
            return self.call + call.bytes / self.bytes
        return self.call + max(call.flops / self.flops[call.kind], call.bytes / self.copy)


def given(tflops: float, gbps: float, source: str = "given") -> Rates:
    """Rates from two figures: TFLOP/s of products, GB/s of memory."""
    speed = gbps * 1e9
    return Rates(flops={kind: tflops * 1e12 for kind in KINDS}, bytes=speed, copy=speed, source=source)


def read_rows(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The measured rows of a checkout; none where there is no such folder."""
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines() if line]


def from_rows(rows: Sequence[Mapping[str, Any]], device: str, dtype: str) -> Rates | None:
    """Rates of the device whose name contains ``device``, or None if it was not measured in this dtype.

    Args:
        rows: as :func:`read_rows` gives them.
        dtype: "bfloat16", "float32".
    """
    own = [r for r in rows if device and device.lower() in str(r.get("device", "")).lower()]
    kernels = [r for r in own if "op" in r and r.get("mode") == "forward"]
    copies = [(r["gb_per_s"] * r["p50_ms"], r["gb_per_s"]) for r in kernels if r.get("backend") == "copy"]
    products = [r["tflop_per_s"] for r in kernels if r.get("backend") == "matmul" and r.get("dtype") == dtype]
    if not copies or not products:
        return None
    gbps = median([speed for moved, speed in copies if moved >= _LARGE_MB] or [max(copies)[1]])
    base = given(median(products), gbps)
    shares: dict[str, list[float]] = {}
    for row in own:
        if row.get("bench") == "end_to_end" and row.get("dtype") == dtype:
            for stage, facts in row["stages"].items():
                if facts.get("roofline_s") and facts.get("s_p50"):
                    shares.setdefault(stage, []).append(facts["roofline_s"] / facts["s_p50"])
    name = next(str(r["device"]) for r in kernels)
    return Rates(
        flops=base.flops,
        bytes=base.bytes,
        copy=base.copy,
        share={stage: median(values) for stage, values in shares.items()},
        source=f"rows of {name}",
    )


def measure(
    stages: Mapping[str, Sequence[Call]],
    device: str = "cpu",
    *,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = 5.0,
) -> dict[str, Rates]:
    """Rates of each stage on this machine, from its heaviest calls.

    Of every operation the calls that should take longest are run, and the others that a stage spends most of its time
    in, one after the other on random inputs of their own, and all of them again until the time is over, so that a slow
    moment of the machine hits few. Each is timed twice, with the caches emptied before it and once more at once, and
    takes the mean of both by the share of its inputs that the stage finds in the cache (`Call.cached`). A call beyond
    20 GFLOP (on a GPU 1 TFLOP) or 2 GB is left out; where that leaves none of a kind, a product of 1024 x 1024, or a
    copy, stands for it.

    Args:
        stages: calls by stage (:func:`javis.stages.trace`).
        device: "cpu" or "cuda".
        clock: seconds; for tests, which count the time of the process alone.
        seconds: after which no further round is begun; there are two at least.
    """
    roof = given(1.0, 0.02)  # 50 FLOPs to the byte: only to tell which calls are heavy
    chosen: dict[str, list[Call]] = {}
    for stage, calls in stages.items():
        able = [c for c in calls if c.flops <= _LONGEST[device] and c.bytes <= _LARGEST]
        able.sort(key=lambda c: c.count * roof.once(c), reverse=True)
        names = [c.name for c in able]
        whole, before = roof.seconds(able), 0.0
        chosen[stage] = []
        for i, c in enumerate(able):
            covers = before < _COVERED * whole and c.flops <= _QUICK[device]
            if names[:i].count(c.name) < _PER_NAME or covers:
                chosen[stage].append(c)
            before += c.count * roof.once(c)
    square = Call("matmul", "mm", 2 * 1024**3, 3 << 22, 1, _on(lambda x: x @ x, (1024, 1024)))
    copy = Call("other", "clone", 0, 2 << 26, 1, _on(torch.clone, (1 << 24,)))
    tiny = Call("other", "add", 0, 12, 1, _on(lambda x: x + x, (1,)))
    modules = Call("other", "modules", 0, 0, 1, _modules)
    runs = [square, copy, tiny, modules, *(c for calls in chosen.values() for c in calls)]
    cold: dict[int, list[float]] = {id(call): [] for call in runs}
    warm: dict[int, list[float]] = {id(call): [] for call in runs}
    flush = torch.zeros(_CACHE[device] // 4, device=device)
    end = time.perf_counter() + seconds
    with torch.no_grad():
        for turn in range(_MOST_TURNS):
            if turn >= 2 and time.perf_counter() > end:
                break
            for call in runs:
                run = call.ready(device)
                run()
                for _ in range(2):
                    if call not in (tiny, modules):
                        flush.add_(1)
                    cold[id(call)].append(_time(run, device, clock))
                    if call.cached:
                        warm[id(call)].append(_time(run, device, clock))
                del run
    spent = {}
    for call in runs:
        far, near = median(cold[id(call)]), median(warm[id(call)] or [0.0])
        spent[id(call)] = far + call.cached * (near - far)
    each, around = spent[id(tiny)], spent[id(modules)] / _MODULE_CALLS

    def speed(calls: Sequence[Call]) -> float:
        work = sum(c.count * (c.bytes if c.kind == "other" else c.flops) for c in calls)
        return work / sum(c.count * max(spent[id(c)] - each, 1e-9) for c in calls)

    made = {}
    for stage, found in chosen.items():
        calls = [c for c in found if (c.bytes if c.kind == "other" else c.flops)]
        kinds = {kind: [c for c in calls if c.kind == kind] for kind in KINDS}
        speeds = {kind: speed(of or [copy if kind == "other" else square]) for kind, of in kinds.items()}
        named = {name: speed([c for c in calls if c.name == name]) for name in {c.name for c in calls}}
        exact = {c.ready: max(spent[id(c)] - each, 0.0) for c in found}
        source = f"measured on this {device}"
        made[stage] = Rates(flops=speeds, bytes=speeds["other"], call=around, named=named, exact=exact, source=source)
    return made


def _modules(device: str) -> Callable[[], object]:
    """What it costs to come to a call, as models do: modules, dispatch, a new tensor."""
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()).to(device)
    x = torch.ones(1, 8, device=device)

    def run() -> object:
        y = x
        for _ in range(_MODULE_CALLS // 4):
            y = y + block(y)
        return y

    return run


def _on(
    function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> Callable[[str], Callable[[], object]]:
    def ready(device: str) -> Callable[[], object]:
        x = torch.ones(shape, device=device)
        return lambda: function(x)

    return ready


def _time(run: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started
