"""Which process this is, and the mesh of processes that make one clip together."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from javis.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from javis.pipeline import JavisPipeline


T = TypeVar("T")


class Rank(NamedTuple):
    """Place of this process among those that were started together, as ``torchrun`` tells it by the environment."""

    rank: int = 0  # 0 .. world - 1
    world: int = 1
    local_rank: int = 0  # among those of this machine: the number of its GPU


def rank_from_env(environment: Mapping[str, str] | None = None) -> Rank:
    """RANK, WORLD_SIZE and LOCAL_RANK; ``Rank()`` where there are none (no ``torchrun``).

    Raises:
        UsageError: values that are no place among so many processes.
    """
    environment = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Rank()
    given = {name: environment.get(name, "0" if name == "LOCAL_RANK" else "") for name in names}
    said = ", ".join(f"{name}={value!r}" for name, value in given.items())
    try:
        place = Rank(*(int(given[name]) for name in names))
    except ValueError:
        place = Rank(-1)
    if not (0 <= place.rank < place.world and place.local_rank >= 0):
        raise UsageError(f"{said} in the environment is no place among processes; start them with torchrun, or unset")
    return place


class Share:
    """What this process does when many make the rows of a file: row i belongs to share ``i % count``.

    ``cfg * seq`` neighbouring processes make every clip of their share together; the first of them, which ``leads``,
    writes it. As a context manager it starts and ends torch.distributed, if processes work together at all: shares need
    nothing of each other.

    Raises:
        UsageError: ``cfg * seq`` does not divide the number of processes.
    """

    def __init__(self, place: Rank, cfg: int = 1, seq: int = 1) -> None:
        self.place, self.cfg, self.seq, self.together = place, cfg, seq, cfg * seq
        self.count = clip_groups(place.world, cfg, seq)
        self.index, member = divmod(place.rank, self.together)
        self.leads = member == 0
        self.shows = place.rank == 0  # the one progress bar
        self._mesh: DeviceMesh | None = None

    def of(self, rows: Sequence[T]) -> Sequence[T]:
        return rows[self.index :: self.count]

    def __enter__(self) -> Share:
        if self.place.world > 1:
            import torch

            gpus = torch.cuda.device_count()
            if self.place.local_rank >= gpus > 1:
                raise UsageError(
                    f"LOCAL_RANK is {self.place.local_rank}, but there are {gpus} GPUs; start fewer processes"
                )
            if gpus:
                torch.cuda.set_device(self.place.local_rank if gpus > 1 else 0)
        if self.together > 1:
            self._mesh = make_mesh(self.cfg, self.seq)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._mesh is not None and kind is None:  # after an error the others may never come to the end
            import torch.distributed as dist

            dist.destroy_process_group()

    def agreed(self, value: T) -> T:
        """The leader's ``value``, on every process that makes clips with it."""
        if self._mesh is None:
            return value
        import torch.distributed as dist

        box = [value]
        for name in ("cfg", "seq"):
            dist.broadcast_object_list(box, group=self._mesh.get_group(name), group_src=0)
        return box[0]

    def parallelize(self, pipe: JavisPipeline) -> None:
        """Where processes make clips together, give the pipeline the parallel form of its model."""
        if self._mesh is not None:
            from javis.parallel.model import ParallelJavisDiT

            pipe.model = ParallelJavisDiT(pipe.model, self._mesh)  # type: ignore[assignment]
            if pipe.student is not None:
                pipe.student.why_not = "processes make a clip together (--cfg-parallel, --seq-parallel)"

    def leave(self, *, failed: bool) -> None:
        """Say that this process is done; one that failed waits here until all are.

        ``torchrun`` ends all processes as soon as one ends with an error, and they may be in the middle of their clips.
        Its store outlives the processes; started by something else, there is nothing to wait for.
        """
        if self.place.world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return
        from torch.distributed import TCPStore

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"javis/done/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        done = store.add(key, 1)
        while failed and done < self.place.world:
            time.sleep(0.2)
            done = store.add(key, 0)


def make_mesh(cfg: int, seq: int) -> DeviceMesh:
    """The mesh of processes, dimensions ("clip", "cfg", "seq"): neighbours in rank share a clip.

    Starts torch.distributed from the environment if nobody has: NCCL for tensors on a GPU, gloo for those on a CPU. All
    processes call it.

    Args:
        cfg: processes over which the two halves of classifier-free guidance are spread, 1 or 2.
        seq: processes over which the tokens of a clip are spread.

    Raises:
        UsageError: ``cfg * seq`` does not divide the number of processes.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    cuda = torch.cuda.is_available()
    clips = clip_groups(rank_from_env().world, cfg, seq)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    sizes, names = (clips, cfg, seq), ("clip", "cfg", "seq")
    return init_device_mesh("cuda" if cuda else "cpu", sizes, mesh_dim_names=names)


def data_place(place: Rank, seq: int) -> Rank:
    """Which share of the data a process trains on, where ``seq`` neighbours have the same clips: place among shares.

    Raises:
        UsageError: ``seq`` does not divide the number of processes.
    """
    return Rank(place.rank // seq, clip_groups(place.world, 1, seq), place.local_rank)


def clip_groups(world: int, cfg: int, seq: int) -> int:
    """How many groups of ``cfg * seq`` processes there are among ``world``."""
    if cfg not in (1, 2):
        raise UsageError(f"guidance has two halves: expected 1 or 2 processes for them, got {cfg}")
    if seq < 1 or world % (cfg * seq):
        raise UsageError(
            f"{world} processes cannot be divided into groups of {cfg} x {seq} (guidance x sequence); start a multiple "
            f"of {max(1, cfg * seq)} with torchrun --nproc-per-node"
        )
    return world // (cfg * seq)
