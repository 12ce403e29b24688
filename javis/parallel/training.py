"""A training step of JavisDiT that the ranks of a group compute together: sequence parallelism with gradients.

Every rank has the whole batch and gets the whole velocity, so each computes the same loss; in between it holds its part
of the tokens (hooks.py), whatever runs on tokens runs on that part, and what runs once for a clip (captions, priors,
embeddings of the timestep) runs on every rank. The gradients that a rank gets for the parameters are its share: their
sum over the group is the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from javis.model.blocks import StepState, Stream
from javis.model.dit import Conditioning, JavisDiT, StepStart, Velocity, _frame_mask
from javis.model.records import ClipTokens
from javis.parallel.collectives import gather
from javis.parallel.hooks import SequenceHooks
from javis.parallel.shards import Shard, divided, shard_condition


@dataclass(frozen=True)
class _SharedStep(StepState):
    """The step of a stream of which this rank holds a part.

    It travels with the arguments of a layer, so that a layer that is computed again in the backward pass exchanges its
    tokens again.
    """

    shard: Shard | None = None
    whole_mask: Tensor | None = None  # of all frames


class SequenceTraining:
    """``begin`` and ``finish`` of a model whose layers share their tokens with ``group`` in between.

    Used in the place of the model's own, around calls of its layers (:meth:`javis.model.layer.JavisLayer.forward`); of
    latents, conditions and masks every rank gives all, and the velocity is whole on every rank. With gradients of a
    loss that every rank computes from it in the same way.

    Args:
        model: its layers are changed until :meth:`remove`; used without this they work as ever.
        streams: those that are computed, and divided.
    """

    def __init__(self, model: JavisDiT, group: ProcessGroup, streams: Sequence[Stream] = ("video", "audio")) -> None:
        self.model, self.group, self.streams = model, group, tuple(streams)
        self.hooks = SequenceHooks(model, group, streams)
        self._undo: list[Callable[[], object]] = [self.hooks.remove]
        for layer in model._layers:
            layer.forward = partial(self._layer, layer.forward)  # type: ignore[method-assign]
            self._undo.append(partial(delattr, layer, "forward"))
            for stream in self.streams:
                block = cast("nn.Module | None", getattr(layer, f"{stream}_prior"))
                if block is not None:
                    self._undo.append(block.register_forward_pre_hook(_own_frames).remove)

    def remove(self) -> None:
        """Leave the model as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def begin(
        self,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        clip: Conditioning,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
    ) -> StepStart:
        """:meth:`JavisDiT.begin` of this rank's part of the tokens; arguments as there, all of the clip.

        Raises:
            UsageError: fewer frames or places than ranks.
            ValueError: as from the model.
        """
        shards, patches = self._shards(clip), (self.model.config.video_patch[0], self.model.config.audio_patch[0])
        whole = {
            name: _frame_mask(mask, len(latents), latents.shape[2], patch)  # checks it, too
            for name, mask, latents, patch in (
                ("video", video_mask, video, patches[0]),
                ("audio", audio_mask, audio, patches[1]),
            )
        }
        v, a = shards["video"], shards["audio"]
        start = self.model.begin(
            video[:, :, v.latents],
            audio[:, :, a.latents],
            timestep,
            shard_condition(clip, slice(None), v, a),
            None if video_mask is None else video_mask[:, v.latents],
            None if audio_mask is None else audio_mask[:, a.latents],
        )

        def shared(name: Stream, step: StepState) -> StepState:
            if name not in self.streams:
                return step
            own = {field.name: getattr(step, field.name) for field in fields(StepState)}
            return _SharedStep(**own, shard=shards[name], whole_mask=whole[name])

        return start._replace(
            video_step=shared("video", start.video_step), audio_step=shared("audio", start.audio_step)
        )

    def finish(
        self,
        v: Tensor,
        a: Tensor,
        start: StepStart,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        clip: Conditioning,
    ) -> Velocity:
        """:meth:`JavisDiT.finish`: this rank's tokens ``v``, ``a`` -> the whole velocity; latents as in `begin`."""
        shards = self._shards(clip)
        own = shard_condition(clip, slice(None), shards["video"], shards["audio"])
        given = video[:, :, shards["video"].latents], audio[:, :, shards["audio"].latents]
        out = self.model.finish(v, a, start, given[0], given[1], timestep, own)

        def whole(name: Stream, x: Tensor) -> Tensor:
            return gather(x, 2, shards[name].latent_sizes, self.group) if name in self.streams else x

        return Velocity(whole("video", out.video), whole("audio", out.audio))

    def _shards(self, clip: Conditioning) -> dict[Stream, Shard]:
        model, made = self.model, dict[Stream, Shard]()
        grids = {"video": model.embed.video.grid(clip.video_sizes), "audio": model.embed.audio.grid(clip.audio_sizes)}
        sizes: dict[Stream, tuple[int, ...]] = {"video": clip.video_sizes, "audio": clip.audio_sizes}
        for name, length in sizes.items():
            ranks = self.group.size() if name in self.streams else 1
            made[name] = divided(model.config, name, length, grids[name], ranks, self.group.rank())
        return made

    def _layer(
        self,
        run: Callable[..., Any],
        video: Tensor | None,
        audio: Tensor,
        start: StepStart,
        tokens: ClipTokens,
        clip: Conditioning,
    ) -> Any:
        """A layer's ``forward``, which exchanges tokens if the step was begun here."""
        streams = {
            name: (step.shard, step.whole_mask)
            for name, step in (("video", start.video_step), ("audio", start.audio_step))
            if isinstance(step, _SharedStep) and step.shard is not None
        }
        if not streams:
            return run(video, audio, start, tokens, clip)
        if clip.clock is not None:
            shards = self._shards(clip)
            clip = replace(clip, clock=shard_condition(clip, slice(None), shards["video"], shards["audio"]).clock)
        with self.hooks.sharing(streams):
            return run(video, audio, start, tokens, clip)


def _own_frames(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Of priors that a layer has resampled to all frames, a prior block gets those of its own."""
    x, step, spatial, temporal, *rest = args
    if not (isinstance(step, _SharedStep) and step.shard is not None and isinstance(temporal, Tensor)):
        return None  # keys and values belong to no frame
    return x, step, spatial, temporal[:, step.shard.frame], *rest
