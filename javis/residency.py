"""Which components are on the device: all of them, or only those of the stage that runs.

A clip is made in stages, and a stage needs few of the components (`STAGES`). On a small card a :class:`Residency`
brings them in when their stage begins and takes the others out first:

``all``      everything is on the device all the time.
``offload``  components wait in host memory (page-locked for CUDA). Weights do not change while sampling, so taking one
             out drops the copy on the device and copies nothing back; buffers are copied back.
``staged``   components wait on disk: each is loaded, used and freed. Host memory holds one stage, too.

What is computed is the same under every policy: the very values are moved. The module objects stay the same ones, but
their tensors change place with every stage, so a captured CUDA graph needs ``all``.

>>> residency = Residency("cuda", "offload")
>>> residency.add("text_encoder", encoder)
>>> with residency.stage("text"):
...     hidden, mask = encoder(captions)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from javis.clip_stages import STAGES, Policy
from javis.errors import FailedError, UsageError

Load = Callable[[nn.Module, torch.device], None]


@dataclass(frozen=True)
class StageRecord:
    """One run of a stage."""

    stage: str
    seconds: float  # of the stage itself
    move_seconds: float  # of bringing components in and out before it
    resident_bytes: int  # weights and buffers of the components on the device
    peak_bytes: int | None  # most that was allocated on the device during the stage; None: not a CUDA device


class Residency:
    """Moves components in and out around the stages.

    Args:
        device: where stages run.
        policy: "all", "staged" or "offload", as above.
        copy: makes the copy of a tensor on the device; the default is ``tensor.to(device)``. For tests.

    Raises:
        UsageError: an unknown policy.
    """

    def __init__(
        self,
        device: str | torch.device,
        policy: Policy = "all",
        *,
        copy: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if policy not in get_args(Policy):
            raise UsageError(f"unknown residency {policy!r}; expected one of {', '.join(get_args(Policy))}")
        self.device, self.policy = torch.device(device), policy
        self.records: list[StageRecord] = []
        self._copy = copy or self._to_device
        self._modules: dict[str, nn.Module] = {}
        self._loads: dict[str, Load] = {}
        self._host: dict[str, dict[int, Tensor]] = {}  # offload: values on the host, by id of parameter
        self._inside: set[str] = set()

    # -- components ---------------------------------------------------------------------------------------------------

    def add(self, name: str, component: Any, load: Load | None = None) -> None:
        """Take charge of a component.

        With "all" it goes to the device now; with "offload" it stays where it is until its stage; with "staged" its
        weights are dropped now and come from ``load`` whenever its stage begins.

        Args:
            name: as in `STAGES`.
            component: an ``nn.Module``. Anything else has no weights to move and is ignored (also None).
            load: for "staged": ``load(module, device)`` gives the module, whose parameters and persistent buffers are
                on the meta device, its weights on ``device`` (`javis.component_files.fill`).

        Raises:
            UsageError: "staged" without ``load``.
        """
        if not isinstance(component, nn.Module):
            return
        if self.policy == "staged" and load is None:
            raise UsageError(
                f"component {name!r} cannot be loaded again for every stage: it was not read from a checkpoint folder; "
                "use residency 'offload' or 'all'"
            )
        self._modules[name] = component
        self._inside.discard(name)
        if load is not None:
            self._loads[name] = load
        if self.policy == "all":
            self._bring_in(name)
        elif self.policy == "staged":
            _forget(component)

    @property
    def resident(self) -> frozenset[str]:
        """Names of the components on the device."""
        return frozenset(self._inside)

    def resident_bytes(self) -> int:
        """Bytes of the parameters and buffers of the components on the device; shared tensors count once."""
        found = {id(t): t.nbytes for name in self._inside for t in _tensors(self._modules[name])}
        return sum(found.values())

    # -- stages -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stage(self, name: str, components: Iterable[str] | None = None) -> Iterator[None]:
        """Run a stage with its components on the device, and note its time and peak in ``records``.

        Args:
            name: of `STAGES`, or any name.
            components: what it needs; None: what `STAGES` says (for another name: the component of that name).

        A component stays until a stage that does not need it begins, so condition and denoise move nothing in between.

        Raises:
            FailedError: out of memory inside the stage, with what to do.
        """
        wanted = STAGES.get(name, (name,)) if components is None else components
        needed = [c for c in wanted if c in self._modules]
        started = time.perf_counter()
        with self._out_of_memory(name):
            if self.policy != "all":
                for other in sorted(self._inside - set(needed)):
                    self._take_out(other)
                for component in needed:
                    self._bring_in(component)
            self._synchronize()
            moved = time.perf_counter()
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self._synchronize()
        ended = time.perf_counter()
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else None
        self.records.append(StageRecord(name, ended - moved, moved - started, self.resident_bytes(), peak))

    def release(self) -> None:
        """Take every component out (nothing under "all"), as between two uses of the pipeline."""
        if self.policy != "all":
            for name in sorted(self._inside):
                self._take_out(name)

    @contextlib.contextmanager
    def _out_of_memory(self, stage: str) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            # On the host torch raises a plain RuntimeError.
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not known and "can't allocate memory" not in str(error):
                raise
            hint = "" if self.policy != "all" else "residency 'offload', "
            raise FailedError(
                f"out of memory in stage {stage!r} with {self.resident_bytes() / 1e9:.1f} GB of weights on "
                f"{self.device}; try {hint}a smaller resolution, fewer seconds or a smaller batch "
                "('javis plan --gpu-memory' says what fits)"
            ) from error

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- moving -------------------------------------------------------------------------------------------------------

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _bring_in(self, name: str) -> None:
        if name in self._inside:
            return
        module = self._modules[name]
        if self.policy == "staged":
            try:
                self._loads[name](module, self.device)
            except BaseException:  # what was loaded before the memory ran out must not stay
                _forget(module)
                raise
            left = [n for n, t in module.state_dict(keep_vars=True).items() if t.is_meta]
            if left:
                raise FailedError(f"component {name!r}: loading left {left[0]!r} without values ({len(left)} in all)")
            for owner, key, buffer in _buffers(module):
                owner._buffers[key] = buffer.to(self.device)  # those that no checkpoint holds stayed on the host
        elif self.policy == "offload":
            self._host[name] = {}
            try:
                self._copy_in(module, self._host[name])
            except BaseException:  # out of memory half-way: what is in goes out again, and the next stage can begin
                self._take_out(name)
                raise
        else:
            module.to(self.device)
        self._inside.add(name)

    def _copy_in(self, module: nn.Module, host: dict[int, Tensor]) -> None:
        for parameter in module.parameters():
            waiting = parameter.data
            if self.device.type == "cuda" and not waiting.is_cuda and not waiting.is_pinned():
                waiting = waiting.pin_memory()
            host[id(parameter)] = waiting
            parameter.data = self._copy(waiting)
        for owner, key, buffer in _buffers(module):
            owner._buffers[key] = self._copy(buffer)

    def _take_out(self, name: str) -> None:
        module = self._modules[name]
        if self.policy == "staged":
            _forget(module)
        else:
            host = self._host.pop(name)
            for parameter in module.parameters():
                parameter.data = host.get(id(parameter), parameter.data)
            for owner, key, buffer in _buffers(module):
                owner._buffers[key] = buffer.to("cpu", copy=True)
        self._inside.discard(name)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Owner, name and value of every buffer, persistent or not."""
    return [
        (owner, key, value) for owner in module.modules() for key, value in owner._buffers.items() if value is not None
    ]


def _forget(module: nn.Module) -> None:
    """Drop the values of a module, all that a checkpoint holds; other buffers wait on the host."""
    for owner, key, value in _buffers(module):
        kept = key in owner._non_persistent_buffers_set
        owner._buffers[key] = value.to("cpu") if kept else value.to("meta")
    _replace(module, {p: torch.empty_like(p, device="meta") for p in module.parameters()})


def _replace(module: nn.Module, values: Mapping[Tensor, Tensor]) -> None:
    """Give parameters other values, which may be on another device; one that occurs twice stays one parameter."""
    made = {p: nn.Parameter(values[p], requires_grad=p.requires_grad) for p in module.parameters() if p in values}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter in made:
                owner._parameters[key] = made[parameter]
