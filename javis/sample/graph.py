"""The denoising step as a CUDA graph: launched as one, so that the CPU has no part in the speed.

`GraphedDenoiser` stands where the model does in :func:`javis.sample.sample`. The first step of a shape is captured, the
others copy their latents, time and masks into the memory the graph reads, and replay it. The conditioning is copied
once per clip. Shapes are kept side by side, the least recently used one is dropped.

A graph replays kernels with the very addresses and Python decisions of its capture. So what a replay would get wrong is
refused (`why_not`): a model that is not on a GPU, parameters elsewhere (offload), hooks, gradients. Changed parameters
are noticed when a clip begins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from javis.errors import FailedError, UsageError
from javis.model.dit import Conditioning, JavisDiT, Velocity


class GraphBackend(Protocol):
    """What records a function and replays it."""

    def why_not(self, device: torch.device) -> str | None:
        """Why nothing on this device can be captured, or None."""
        ...

    def capture(self, function: Callable[[], Velocity]) -> tuple[Velocity, Callable[[], None]]:
        """Record ``function``; returns its outputs, and what recomputes them in the same memory."""
        ...


class CudaGraphs:
    """`torch.cuda.CUDAGraph`; all graphs share one pool of memory, since only one is replayed at a time.

    Outputs stay alive as long as their graph, so no other graph of the pool is given their memory.
    """

    WARM_UP = 3  # runs before a capture: libraries allocate their workspaces, Triton compiles and tunes

    def __init__(self) -> None:
        self._pool: Any = None

    def why_not(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"needs a CUDA device, the model is on {device}"

    def capture(self, function: Callable[[], Velocity]) -> tuple[Velocity, Callable[[], None]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=self._pool):
            out = function()
        return out, graph.replay


@dataclass
class _Captured:
    """One graph: the memory it reads, what it gives, and whose conditioning is in that memory."""

    inputs: tuple[Tensor | None, ...]
    told: _Static
    condition: Conditioning | None  # the one in ``told``; held, so that no other can take its identity
    weights: tuple[int, ...]
    out: Velocity
    replay: Callable[[], None]


class GraphedDenoiser:
    """A model whose ``denoise`` is replayed from CUDA graphs; a stand-in for it in :func:`javis.sample.sample`.

    Args:
        model: in eval mode, on a GPU, in its final precision; compiled blocks are fine.
        limit: graphs to keep. Each holds a copy of the conditioning (about 0.8 GB at full size with guidance).
        backend: what captures; CUDA graphs by default.

    Raises:
        UsageError: the model cannot be captured; the message says why.
    """

    def __init__(self, model: JavisDiT, *, limit: int = 4, backend: GraphBackend | None = None) -> None:
        if limit < 1:
            raise UsageError(f"the number of graphs to keep must be at least 1, got {limit}")
        self.model, self.limit = model, limit
        self.backend: GraphBackend = CudaGraphs() if backend is None else backend
        self._graphs: OrderedDict[Any, _Captured] = OrderedDict()
        self._refuse()

    @property
    def config(self) -> Any:
        return self.model.config

    def __len__(self) -> int:
        """Graphs that are kept."""
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs.clear()

    def why_not(self) -> str | None:
        """Why a step of this model cannot be captured, or None."""
        parameters = list(self.model.parameters())
        device = parameters[0].device
        if (reason := self.backend.why_not(device)) is not None:
            return reason
        if elsewhere := {str(p.device) for p in parameters} - {str(device)}:
            return f"some parameters are on {', '.join(sorted(elsewhere))}: a graph cannot move them (offload)"
        for name, module in self.model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{name or 'the model'} has forward hooks, which a graph does not run"
        if self.model.training:
            return "the model is in training mode"
        return None

    def _refuse(self) -> None:
        if (reason := self.why_not()) is not None:
            raise UsageError(f"CUDA graphs: {reason}; run without them")

    def denoise(
        self,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        condition: Conditioning,
        *,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Velocity:
        """As :meth:`javis.model.dit.JavisDiT.denoise`; the result is the caller's to keep.

        Raises:
            UsageError: gradients are on, or the model can no longer be captured.
            FailedError: the capture failed; the message says what the step did that a graph cannot.
        """
        if torch.is_grad_enabled():
            raise UsageError("CUDA graphs: a graph has no gradients; call it under torch.no_grad()")
        now = (video, audio, timestep, video_mask, audio_mask, end)
        key = (tuple(None if x is None else (x.dtype, x.shape, x.device) for x in now), _layout(condition))
        found = self._graphs.get(key)
        if found is not None and found.condition is not condition and found.weights != self._weights():
            self.clear()  # they read memory that is no longer the model's
            found = None
        if found is None:
            found = self._graphs[key] = self._capture(now, condition)
            while len(self._graphs) > self.limit:
                self._graphs.popitem(last=False)
        else:
            for memory, value in zip(found.inputs, now, strict=True):
                if memory is not None and value is not None:
                    memory.copy_(value)
            if found.condition is not condition:
                found.told.load(condition)
                found.condition = condition
        self._graphs.move_to_end(key)
        found.replay()
        return Velocity(found.out.video.clone(), found.out.audio.clone())

    def _capture(self, now: tuple[Tensor | None, ...], condition: Conditioning) -> _Captured:
        self._refuse()
        # A step's timestep may be a view into the schedule: where it lies does not matter, so copies are contiguous.
        inputs = tuple(None if x is None else x.clone(memory_format=torch.contiguous_format) for x in now)
        told = _Static(condition)
        video, audio, timestep, video_mask, audio_mask, end = inputs
        more = {} if end is None else {"end": end}
        assert video is not None and audio is not None and timestep is not None

        def step() -> Velocity:
            return self.model.denoise(
                video, audio, timestep, told.value, video_mask=video_mask, audio_mask=audio_mask, **more
            )

        try:
            out, replay = self.backend.capture(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise FailedError(
                f"the denoising step cannot be captured as a CUDA graph ({' '.join(str(error).split())[:300]}); "
                "run without CUDA graphs"
            ) from error
        return _Captured(inputs, told, condition, self._weights(), out, replay)

    def _weights(self) -> tuple[int, ...]:
        """Addresses of all parameters and buffers."""
        return tuple(t.data_ptr() for part in (self.model.parameters(), self.model.buffers()) for t in part)


# -- the memory a graph reads -----------------------------------------------------------------------------------------


def _leaves(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [_map(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _map(getattr(value, f.name), change) for f in fields(value)})
    return value


def _layout(value: Any) -> Any:
    """All but the numbers: nesting, plain values, and how every tensor lies in memory, shared memory included."""
    places: dict[int, int] = {}

    def describe(item: Any) -> Any:
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            number = places.setdefault(storage.data_ptr(), len(places))
            where = (number, storage.nbytes(), item.storage_offset(), item.device)
            return (item.dtype, tuple(item.shape), item.stride(), *where)
        if isinstance(item, (tuple, list)):
            return (type(item).__name__, *map(describe, item))
        if is_dataclass(item) and not isinstance(item, type):
            return tuple((field.name, describe(getattr(item, field.name))) for field in fields(item))
        return item

    return describe(value)


class _Static:
    """A copy of a nest of tensors at addresses that stay. Memory that tensors share is copied once, as it lies.

    Keys and values, for one, are two views of one projection. With the same strides as before the libraries choose the
    same kernels, and the results are the same to the bit.
    """

    def __init__(self, value: Any) -> None:
        self._memory = {t.untyped_storage().data_ptr(): _bytes(t).clone() for t in _leaves(value)}

        def moved(tensor: Tensor) -> Tensor:
            storage = self._memory[tensor.untyped_storage().data_ptr()].untyped_storage()
            made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            return made.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]

        self.value = _map(value, moved)

    def load(self, value: Any) -> None:
        """Copy the numbers of a nest with the same `_layout`."""
        sources = {t.untyped_storage().data_ptr(): t for t in _leaves(value)}
        for memory, source in zip(self._memory.values(), sources.values(), strict=True):
            memory.copy_(_bytes(source))


def _bytes(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())  # type: ignore[call-overload]


__all__ = ["CudaGraphs", "GraphBackend", "GraphedDenoiser"]
