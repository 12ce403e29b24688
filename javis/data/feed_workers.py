"""Processes that read and decode clips. One that hangs or crashes on a file is replaced, and the file is to blame."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from javis.data.excerpt import BadClip, EncodedExcerpt, ExcerptRequest, decode_excerpt, read_excerpt
from javis.errors import FailedError

P = ParamSpec("P")
T = TypeVar("T")
LATE, GONE = "late", "gone"
START_TIMEOUT = 120.0  # seconds for a process to start: a loaded machine takes long


def _serve(connection: Connection) -> None:
    """The life of a worker: (kind, request) in; "bad" and the reason, or "done" and the result out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that feeds
    with contextlib.suppress(EOFError, OSError):  # whoever asked is gone
        connection.recv()
        connection.send("ready")
        while True:
            kind, request, *options = connection.recv()
            try:
                if kind == "read":
                    connection.send(("done", read_excerpt(request, *options)))
                else:
                    video, sound = decode_excerpt(request)
                    connection.send(("done", sound))
                    connection.send_bytes(memoryview(video).cast("B"))
            except BadClip as error:
                connection.send(("bad", str(error)))


class _Worker:
    """A process and the connection to it; used by one thread."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), name="javis-feed", daemon=True)
        self.process.start()
        theirs.close()
        if self.ask(START_TIMEOUT, "start") != "ready":
            self.end()
            raise FailedError(
                "a process for decoding did not start; a script that feeds needs `if __name__ == '__main__':`, or "
                "workers=0 to decode without processes"
            )

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def ask(self, timeout: float, *job: Any) -> Any:
        """The reply; `LATE` or `GONE` if there is none, and then the worker is of no use any more."""
        try:
            self.connection.send(job)
            return self.connection.recv() if self.connection.poll(timeout) else LATE
        except (EOFError, OSError):
            return GONE

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Workers:
    """Runs jobs on worker processes, one thread of this process for each of them.

    Args:
        count: processes; 0 reads and decodes in threads of this process, where nothing can be timed out.
        timeout: seconds for one clip.
    """

    def __init__(self, count: int, timeout: float) -> None:
        self.count, self.timeout = count, timeout
        self._threads = ThreadPoolExecutor(max(1, count), thread_name_prefix="javis-feed")
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._closed = False

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``function`` on one of the threads; it may call `decode` and `read`."""
        return self._threads.submit(function, *args, **kwargs)

    def decode(self, request: ExcerptRequest, video: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Decode a clip into ``video`` (uint8 [T, H, W, 3], contiguous) and return its sound. Raises `BadClip`."""
        if not self.count:
            video[...], sound = decode_excerpt(request)
            return sound
        sound = self._ask("decode", request)
        self._worker().connection.recv_bytes_into(memoryview(video).cast("B"))
        return sound  # type: ignore[no-any-return]

    def read(self, request: ExcerptRequest, decode_other: bool) -> EncodedExcerpt:
        """As `read_excerpt`."""
        if not self.count:
            return read_excerpt(request, decode_other)
        return self._ask("read", request, decode_other)  # type: ignore[no-any-return]

    def _worker(self) -> _Worker:
        worker = getattr(self._mine, "worker", None)
        if worker is None:
            worker = self._mine.worker = _Worker()
            with self._lock:
                self._workers.add(worker)
                closed = self._closed
            if closed:
                self._drop(worker)
                raise FailedError("the feeder is closed")
        return worker  # type: ignore[no-any-return]

    def _drop(self, worker: _Worker) -> None:
        self._mine.worker = None
        with self._lock:
            self._workers.discard(worker)
        worker.end()

    def _ask(self, *job: Any) -> Any:
        worker = self._worker()
        reply = worker.ask(self.timeout, *job)
        if reply in (LATE, GONE):
            if reply == GONE:
                worker.process.join(5)
            code = worker.process.exitcode or 0
            self._drop(worker)
            if self._closed:
                raise FailedError("the feeder is closed")
            if reply == LATE:
                raise BadClip(f"took longer than {self.timeout:g} s")
            raise BadClip(f"made the decoder crash ({signal.Signals(-code).name if code < 0 else f'exit {code}'})")
        kind, value = reply
        if kind == "bad":
            raise BadClip(value)
        return value

    def close(self) -> None:
        """End the processes; running jobs fail."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.process.kill()  # its thread sees the end of the connection


def default_workers() -> int:
    """As many as there are cores for this process, four at most."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
