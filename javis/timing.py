"""Timing of short calls: variants take turns launch by launch, so that a slow moment of the machine hits them all.

On a CPU by the clock; on a GPU by CUDA events, with the second-level cache emptied before each launch, and launches
that are too short for that (a launch costs the host some microseconds) replayed in a CUDA graph over rotated inputs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

_MIN_TURNS = 7
_GRAPH_BELOW = 100e-6  # seconds
_FLUSH_BYTES = 256 << 20  # several times the cache of any GPU
_GRAPH_ROUNDS = 4


@dataclass(frozen=True)
class Timed:
    """What is timed: ``run(prepare(i))`` with the i-th set of inputs, and only ``run`` counts."""

    run: Callable[[Any], object]
    prepare: Callable[[int], Any] | None = None  # None: run takes i
    aside: bool = False  # long and no rival of the others: before and after their turns, not among them

    def __call__(self, i: int) -> object:
        return self.run(i if self.prepare is None else self.prepare(i))


def interleave(
    calls: Mapping[str, Timed], copies: int, seconds: float, device: str = "cpu"
) -> tuple[dict[str, list[float]], str]:
    """Seconds of each launch by variant, and how they were measured: "clock", "events" or "graph".

    Args:
        calls: the variants.
        copies: sets of inputs, which every variant goes through in turn.
        seconds: how long to go on; every variant runs at least seven times.
        device: "cpu" or "cuda".
    """
    for call in calls.values():
        for i in range(min(3, copies)):
            call(i)
    if device != "cuda":
        return _turns(calls, copies, seconds, _by_clock), "clock"
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    by_events = _EventTimer(flush)
    if all(call.prepare is None for call in calls.values()):
        slowest = max(min(by_events(call, i % copies) for i in range(3)) for call in calls.values() if not call.aside)
        if slowest < _GRAPH_BELOW:
            return _graphs(calls, copies, seconds), "graph"
    return _turns(calls, copies, seconds, by_events), "events"


def _turns(
    calls: Mapping[str, Timed], copies: int, seconds: float, timer: Callable[[Timed, int], float]
) -> dict[str, list[float]]:
    """Whoever comes second on the same inputs finds them in the cache, and whoever follows a large call finds nothing:
    so in a turn each variant has inputs of its own, and the order of a turn is drawn at random."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    variants = [item for item in enumerate(calls.items()) if not item[1][1].aside]
    asides = [item for item in calls.items() if item[1].aside]
    spread = max(1, copies // max(1, len(variants)))
    order = random.Random(0)
    for name, call in asides:
        times[name] += [timer(call, i % copies) for i in range(_MIN_TURNS // 2)]
    end = time.perf_counter() + seconds
    turn = 0
    while turn < _MIN_TURNS or time.perf_counter() < end:
        for number, (name, call) in order.sample(variants, len(variants)):
            times[name].append(timer(call, (turn + number * spread) % copies))
        turn += 1
    for name, call in asides:
        times[name] += [timer(call, i % copies) for i in range(_MIN_TURNS - _MIN_TURNS // 2)]
    return times


def _by_clock(call: Timed, i: int) -> float:
    given = i if call.prepare is None else call.prepare(i)
    start = time.perf_counter()
    result = call.run(given)
    seconds = time.perf_counter() - start
    del result  # freed outside the timed part, as it would be later in a model
    return seconds


class _EventTimer:
    def __init__(self, flush: torch.Tensor) -> None:
        self.flush = flush

    def __call__(self, call: Timed, i: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        given = i if call.prepare is None else call.prepare(i)
        self.flush.zero_()  # also keeps the GPU busy while the host launches what is timed
        start.record()
        call.run(given)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _graphs(calls: Mapping[str, Timed], copies: int, seconds: float) -> dict[str, list[float]]:
    """Each variant's launches on all sets of inputs as one graph; a launch is its share of the replay."""
    replays = {}
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(0)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            for i in range(copies * _GRAPH_ROUNDS):
                call(i % copies)
        replays[name] = Timed(partial(_replay, graph), aside=call.aside)
    # One replay goes over more inputs than the cache holds, so nothing is flushed between replays.
    timer = _EventTimer(torch.empty(1, dtype=torch.uint8, device="cuda"))
    times = _turns(replays, 1, seconds, timer)
    return {name: [value / (copies * _GRAPH_ROUNDS) for value in values] for name, values in times.items()}


def _replay(graph: torch.cuda.CUDAGraph, _: int) -> None:
    graph.replay()


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
