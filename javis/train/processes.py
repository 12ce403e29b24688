"""The processes of one training run: started by torchrun, or this one alone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from javis.errors import UsageError
from javis.parallel.ranks import Rank, rank_from_env

log = logging.getLogger("javis.train")


class Processes:
    """Who trains together. Starts torch.distributed if nobody has and ``needed``; `close` ends what it started.

    Attributes:
        rank, world: of this process among all.
        device: of this process.
        control, writing: groups on the CPU, for agreements and for the thread that writes checkpoints, whose messages
            must not mix; None where this process is alone.

    Raises:
        UsageError: a GPU that is not there, more processes on this machine than GPUs.
    """

    def __init__(self, device: str, *, needed: bool) -> None:
        place = rank_from_env()
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda was asked for, but torch sees no GPU; use --device cpu")
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            gpus = torch.cuda.device_count()
            if place.local_rank >= gpus:
                raise UsageError(f"LOCAL_RANK is {place.local_rank}, but there are {gpus} GPUs; start fewer processes")
            torch.cuda.set_device(place.local_rank)
        self.device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
        self._started = False
        if dist.is_initialized():
            place = Rank(dist.get_rank(), dist.get_world_size(), place.local_rank)
        elif place.world > 1 or needed:
            # A process of its own needs no address; torchrun's have one in the environment.
            where: dict[str, Any] = {}
            if place.world == 1:
                where = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **where)
            self._started = True
        self.rank, self.world = place.rank, place.world
        self.control: Any = dist.new_group(backend="gloo") if self.world > 1 else None
        self.writing: Any = dist.new_group(backend="gloo") if self.world > 1 else None

    def gathered(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank. They go over the network of this run only."""
        if self.control is None:
            return [value]
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, value, group=self.control)
        return every

    def from_first(self, value: Any) -> Any:
        """``value`` of rank 0, on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place, of a tensor on the device."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def close(self) -> None:
        """After an error don't: the others may never come to the end."""
        if self._started and dist.is_initialized():
            dist.destroy_process_group()


def same_weights(module: torch.nn.Module, processes: Processes) -> None:
    """Give every rank the parameters and buffers of rank 0; before sharding, which takes a part of each rank's."""
    if processes.world > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def leave_with_parent() -> None:
    """End this process when the one that started it is gone.

    For a worker of torchrun only: a killed agent leaves its workers behind, and they would write beside their
    successors. A run started from a shell may outlive it (nohup).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        log.error("the process that started this worker is gone; it ends too")
        os._exit(1)  # the main thread may be waiting for a rank that is no more

    threading.Thread(target=watch, name="leave_with_parent", daemon=True).start()


class StopRequest:
    """Whether SIGTERM or SIGINT asked this process to stop. A second one acts at once, as it would have before."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def by_another(self) -> None:
        """Another process was asked; this one ends in the same way."""
        self.signal = signal.SIGTERM

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note these signals instead of dying of them; on leaving, one that came is sent again to who listened before.

        So a command ends as it would have, but with a checkpoint. Outside the main thread this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            restore()
            log.warning("%s: saving a checkpoint before the end", signal.Signals(number).name)

        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            restore()
        if self.signal is not None:
            signal.raise_signal(self.signal)


__all__ = ["Processes", "StopRequest", "leave_with_parent", "same_weights"]
