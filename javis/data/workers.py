"""Work on files that may be hostile: in other processes, with a limit in time, so that none can stop the rest."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from javis.errors import FailedError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Why an item has no result."""

    reason: str


@dataclass
class _Worker(Generic[Item]):
    process: Any
    connection: Connection
    task: int | None = None
    deadline: float = field(default=float("inf"))
    is_ready: bool = False  # has imported what it needs; the time of an item does not include that

    def give(self, index: int, item: Item, timeout: float) -> None:
        self.connection.send((index, item))
        self.task, self.deadline = index, time.monotonic() + timeout

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def default_processes() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def isolated_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, processes: int, timeout: float
) -> Iterator[tuple[int, Result | Failure]]:
    """(index, ``function(item)``) of every item, in the order in which they are done.

    A process that dies, raises or takes longer than ``timeout`` seconds for an item makes a `Failure` of that item;
    another process takes its place. All processes end with the iteration, or with this one.

    Args:
        function: a function of a module. items: taken as workers become free. processes: at least 1.

    Raises:
        FailedError: processes cannot be started at all.
    """
    methods = multiprocessing.get_all_start_methods()
    # Not fork: this process may have threads (torch, DALI), and a copy of their locks would never be released.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        multiprocessing.set_forkserver_preload(["__main__", function.__module__])

    def start() -> _Worker[Item]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, function), daemon=True)  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        return _Worker(process, ours)

    pending = enumerate(items)
    exhausted = False
    workers = [start() for _ in range(max(1, processes))]
    try:
        while workers:
            for worker in [w for w in workers if w.is_ready and w.task is None]:
                following = None if exhausted else next(pending, None)
                if following is None:
                    exhausted = True
                    workers.remove(worker)
                    worker.kill()
                else:
                    worker.give(*following, timeout)
            if exhausted:
                for worker in [w for w in workers if w.task is None]:  # still starting, and not needed any more
                    workers.remove(worker)
                    worker.kill()
            left = min((worker.deadline for worker in workers), default=0) - time.monotonic()
            ready = wait([w.connection for w in workers], None if left == float("inf") else max(0.0, left))
            for worker in list(workers):
                index, answer = worker.task, None
                if worker.connection in ready:
                    try:
                        answer = worker.connection.recv()
                    except (EOFError, OSError):
                        answer = _obituary(worker)
                    if not worker.is_ready:
                        if isinstance(answer, Failure):
                            raise FailedError(f"a worker process cannot start: {answer.reason}")
                        worker.is_ready = True
                        continue
                elif time.monotonic() >= worker.deadline:
                    answer = Failure(f"no answer within {timeout:g} s")
                if answer is None or index is None:
                    continue
                worker.task, worker.deadline = None, float("inf")
                if isinstance(answer, Failure):
                    worker.kill()
                    workers[workers.index(worker)] = start()
                    yield index, answer
                else:
                    ok, value = answer
                    yield index, value if ok else Failure(value)
    finally:
        for worker in workers:
            worker.kill()


def _obituary(worker: _Worker[Any]) -> Failure:
    worker.process.join()
    code = worker.process.exitcode
    if code is not None and code < 0:
        return Failure(f"the process that read it was ended by {signal.Signals(-code).name}")
    return Failure(f"the process that read it ended with code {code}")


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Answer items until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connection.send("ready")
    while True:
        try:
            index, item = connection.recv()
        except (EOFError, OSError):
            return
        del index
        try:
            answer = (True, function(item))
        except Exception as error:  # noqa: BLE001 broad on purpose: whatever a file provokes belongs to that file
            answer = (False, f"{type(error).__name__}: {error}")
        connection.send(answer)
