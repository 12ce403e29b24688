"""A JavisDiT whose denoising step is shared by a mesh of processes.

Sequence parallel ("seq"): attention is factorised, so a spatial block needs whole frames and a temporal block whole
columns of time. Ranks hold some of the frames; around each temporal block an all-to-all turns "my frames, all places"
into "all frames, my places" and back (dynamic sequence parallelism, arXiv 2403.10266). All else, captions, priors,
norms, MLPs, is local to a token, except the bidirectional attention (bidirectional.py).

Guidance parallel ("cfg"): the conditional and the unconditional half of the batch are computed by different ranks.

The model itself knows nothing of it: the switches are hooks (hooks.py). For training see training.py.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from javis.errors import UsageError
from javis.model.blocks import Stream
from javis.model.config import JavisDiTConfig
from javis.model.dit import Conditioning, JavisDiT, Velocity, _frame_mask
from javis.parallel.collectives import gather, span, split_sizes
from javis.parallel.hooks import SequenceHooks
from javis.parallel.shards import Shard, divided, shard_condition

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class _Share:
    """What of a batch of clips this rank computes."""

    rows: list[int]  # samples of each rank of "cfg"; one entry: each has all of them
    row: slice  # this rank's
    video: Shard
    audio: Shard
    condition: Conditioning


class ParallelJavisDiT(nn.Module):
    """Takes the place of its model in :func:`javis.sample.sample` and :class:`javis.pipeline.JavisPipeline`.

    Every process of the mesh calls it with the same arguments and gets the same result: latents are whole everywhere
    (they are small), tokens are not. For sampling only; results carry no gradients.

    Args:
        model: the same on every process, with the same weights. It can go on being used by itself.
        mesh: has dimensions "cfg" and "seq" (:func:`javis.parallel.make_mesh`).
        shard_audio: False keeps the audio stream whole on every rank: the few audio tokens are computed more than once,
            and three of six exchanges per layer are saved.
    """

    def __init__(self, model: JavisDiT, mesh: DeviceMesh, *, shard_audio: bool = True) -> None:
        super().__init__()
        missing = {"cfg", "seq"} - set(mesh.mesh_dim_names or ())
        if missing:
            raise ValueError(f"the mesh has dimensions {mesh.mesh_dim_names}; expected 'cfg' and 'seq' among them")
        self.model, self.shard_audio = model, shard_audio
        self.cfg, self.seq = mesh.get_group("cfg"), mesh.get_group("seq")
        self._last: tuple[weakref.ref[Conditioning], _Share] | None = None
        self._hooks = SequenceHooks(model, self.seq, ("video", "audio") if shard_audio else ("video",))

    @property
    def config(self) -> JavisDiTConfig:
        return self.model.config

    @property
    def null_text(self) -> Tensor:
        return self.model.null_text

    @property
    def null_prior(self) -> tuple[Tensor, Tensor]:
        return self.model.null_prior

    def condition(self, *args: Any, **kwargs: Any) -> Conditioning:
        """:meth:`JavisDiT.condition` of all clips, on every process.

        Raises:
            UsageError: fewer samples than ranks of "cfg".
        """
        made = self.model.condition(*args, **kwargs)
        if len(made.fps) < self.cfg.size():
            raise UsageError(
                f"{self.cfg.size()} processes share the halves of guidance, but there is {len(made.fps)} sample; "
                "without guidance use one"
            )
        return made

    @torch.no_grad()
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
        """:meth:`JavisDiT.denoise`, with the same arguments and results, computed together.

        Fewer samples than ranks of "cfg" (a step without guidance, outside its interval) are computed by all of those.

        Raises:
            UsageError: fewer frames or places than ranks of "seq".
            ValueError: as from the model.
        """
        share = self._share(condition, len(video), tuple(video.shape[2:]), tuple(audio.shape[2:]))
        row, patches = share.row, (self.config.video_patch[0], self.config.audio_patch[0])
        masks, streams = {}, {}
        for name, shard, mask, latents, patch in (
            ("video", share.video, video_mask, video, patches[0]),
            ("audio", share.audio, audio_mask, audio, patches[1]),
        ):
            tokens = _frame_mask(mask, len(video), latents.shape[2], patch)  # checks it, too
            streams[name] = (shard, None if tokens is None else tokens[row])
            masks[f"{name}_mask"] = None if mask is None else mask[row, shard.latents]
        with self._hooks.sharing(streams):  # the hooks exchange tokens
            out = self.model.denoise(
                video[row, :, share.video.latents],
                audio[row, :, share.audio.latents],
                timestep[row],
                share.condition,
                end=None if end is None else end[row],
                **masks,
            )
        return Velocity(self._whole(out.video, share.video, share), self._whole(out.audio, share.audio, share))

    def forward(self, *args: Any, **kwargs: Any) -> Velocity:
        """Refused: this model is for sampling, where conditioning is done once per clip."""
        raise UsageError(
            "a model on several processes samples only; call condition once per clip, then denoise in every step"
        )

    # -- who does what ------------------------------------------------------------------------------------------------

    def _share(self, condition: Conditioning, batch: int, video: tuple[int, ...], audio: tuple[int, ...]) -> _Share:
        """This rank's share; the conditioning is divided once per clip."""
        if (batch, video, audio) != (len(condition.fps), condition.video_sizes, condition.audio_sizes):
            raise ValueError(
                f"{batch} samples of video latents {video} and audio latents {audio} do not fit the conditioning, "
                f"which is for {len(condition.fps)} samples of {condition.video_sizes} and {condition.audio_sizes}"
            )
        if self._last is not None and self._last[0]() is condition:
            return self._last[1]
        alone = batch < self.cfg.size()
        rows = [batch] if alone else split_sizes(batch, self.cfg.size())
        row = span(rows, 0 if alone else self.cfg.rank())
        shards = {
            "video": self._shard("video", video, self.model.embed.video.grid(video), True),
            "audio": self._shard("audio", audio, self.model.embed.audio.grid(audio), self.shard_audio),
        }
        share = _Share(rows, row, **shards, condition=shard_condition(condition, row, **shards))
        self._last = (weakref.ref(condition, self._forget), share)
        return share

    def _forget(self, condition: weakref.ref[Conditioning]) -> None:
        """The clip is done: its share views the same memory."""
        if self._last is not None and self._last[0] is condition:
            self._last = None

    def _shard(self, stream: Stream, sizes: tuple[int, ...], grid: tuple[int, ...], shared: bool) -> Shard:
        return divided(self.config, stream, sizes, grid, self.seq.size() if shared else 1, self.seq.rank())

    def _whole(self, x: Tensor, shard: Shard, share: _Share) -> Tensor:
        if len(shard.frames) > 1:
            x = gather(x, 2, shard.latent_sizes, self.seq)
        return gather(x, 0, share.rows, self.cfg) if len(share.rows) > 1 else x
