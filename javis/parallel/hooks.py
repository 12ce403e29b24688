"""What makes a JavisDiT exchange tokens: hooks of its temporal blocks, and another bidirectional attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from javis.model.blocks import StepState, Stream
from javis.model.dit import JavisDiT
from javis.parallel.bidirectional import backend_for, sharded_attention
from javis.parallel.collectives import exchange
from javis.parallel.shards import Shard

# Of each stream in work: what this rank holds of it, and its condition mask at token resolution, of all frames.
Streams = Mapping[str, tuple[Shard, Tensor | None]]


class SequenceHooks:
    """While streams are `sharing`, the blocks of ``model`` exchange tokens with the ranks of ``group``.

    Otherwise the model works by itself, as ever. A group of one exchanges nothing.

    Args:
        streams: those that are divided; the other one is whole on every rank.
    """

    def __init__(self, model: JavisDiT, group: ProcessGroup, streams: Sequence[Stream]) -> None:
        self.group, self.divided = group, tuple(streams)
        self._streams: Streams = {}
        self._undo: list[Callable[[], object]] = []
        if group.size() > 1:
            for layer in model._layers:
                for stream in self.divided:
                    block = cast(nn.Module, getattr(layer, f"{stream}_temporal"))
                    self._undo.append(block.register_forward_pre_hook(self._to_places(stream)).remove)
                    self._undo.append(block.register_forward_hook(self._to_frames(stream)).remove)
                if layer.bidirectional is not None:
                    self._attend_together(layer.bidirectional)

    @contextmanager
    def sharing(self, streams: Streams) -> Iterator[None]:
        """Exchange what is within: every rank of the group runs the same blocks."""
        self._streams = streams
        try:
            yield
        finally:
            self._streams = {}

    def remove(self) -> None:
        """Leave the model as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _to_places(self, stream: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if stream not in self._streams:
                return None  # the model is used by itself
            (shard, mask), (x, step, *rest) = self._streams[stream], args
            assert isinstance(step, StepState)
            x = x.unflatten(1, (step.frames, -1))
            x = exchange(x, split=2, out_sizes=shard.places, join=1, in_sizes=shard.frames, group=self.group)
            return x.flatten(1, 2), replace(step, frames=sum(shard.frames), frame_mask=mask), *rest

        return hook

    def _to_frames(self, stream: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], x: Tensor) -> Tensor | None:
            if stream not in self._streams:
                return None
            shard = self._streams[stream][0]
            x = x.unflatten(1, (sum(shard.frames), -1))
            x = exchange(x, split=1, out_sizes=shard.frames, join=2, in_sizes=shard.places, group=self.group)
            return x.flatten(1, 2)

        return hook

    def _attend_together(self, block: Any) -> None:
        ops = block.ops
        alone = ops.bidirectional_attention
        backend = backend_for(alone)

        def attend(q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int) -> Any:
            if not self._streams:
                return alone(q_video, q_audio, v_video, v_audio, num_heads)
            shard = self._streams["audio"][0]
            whole = "audio" not in self.divided
            tokens = None if whole else [frames * sum(shard.places) for frames in shard.frames]
            return sharded_attention(
                q_video, q_audio, v_video, v_audio, num_heads, audio_sizes=tokens, group=self.group, backend=backend
            )

        block.ops = replace(ops, bidirectional_attention=attend)
        self._undo.append(lambda: setattr(block, "ops", ops))
