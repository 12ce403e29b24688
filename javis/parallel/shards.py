"""Which part of a stream a rank holds, and the conditioning that belongs to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from javis.errors import UsageError
from javis.model.blocks import Stream
from javis.model.config import JavisDiTConfig
from javis.model.dit import Conditioning, LayerCondition
from javis.model.ops import Rope
from javis.parallel.collectives import span, split_sizes


@dataclass(frozen=True)
class Shard:
    """One rank's part of a stream of [time, space] tokens.

    Attributes:
        frames: frames of tokens that each rank holds outside temporal blocks.
        places: places that each rank holds within temporal blocks.
        latent_sizes: latent frames of each rank (a frame of tokens covers ``patch`` of them; the last may be cut).
        frame, latents: where this rank's frames of tokens, and its latent frames, lie in the clip.
    """

    frames: list[int]
    places: list[int]
    latent_sizes: list[int]
    frame: slice
    latents: slice

    @classmethod
    def of(cls, length: int, patch: int, grid: tuple[int, ...], ranks: int, rank: int) -> Shard:
        """Divide ``length`` latent frames in patches of ``patch``, tokens in ``grid`` (time, then space)."""
        frames = split_sizes(grid[0], ranks)
        ends = [min(length, patch * span(frames, r).stop) for r in range(ranks)]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        places = split_sizes(math.prod(grid[1:]), ranks)
        return cls(frames, places, sizes, span(frames, rank), span(sizes, rank))


def divided(
    config: JavisDiTConfig, stream: Stream, sizes: tuple[int, ...], grid: tuple[int, ...], ranks: int, rank: int
) -> Shard:
    """The part of a stream with latents of ``sizes`` and tokens in ``grid`` that ``rank`` of ``ranks`` holds.

    Raises:
        UsageError: fewer frames or places than ranks.
    """
    patch = (config.video_patch if stream == "video" else config.audio_patch)[0]
    shard = Shard.of(sizes[0], patch, grid, ranks, rank if ranks > 1 else 0)
    if 0 in (*shard.frames, *shard.places):
        raise UsageError(
            f"{ranks} processes cannot share {grid[0]} frames x {sum(shard.places)} places of {stream} tokens; "
            f"use at most {min(grid[0], sum(shard.places))}"
        )
    return shard


def shard_condition(condition: Conditioning, row: slice, video: Shard, audio: Shard) -> Conditioning:
    """The part of ``condition`` for samples ``row`` and the frames of both shards: views, nothing is copied.

    The RoPE tables stay whole: they are of the temporal blocks, where a rank has all frames.
    """

    def rows(values: Any) -> Any:
        """A KeyValue or a FoldedPrior, for these samples."""
        return type(values)(*(value[row] for value in values))

    def priors(told: Any, shard: Shard) -> Any:
        if told is None:
            return None
        spatial, temporal = told
        if isinstance(spatial, Tensor):  # resampled tokens, [B, places, .] and [B, frames, .]
            return spatial[row], temporal[row, shard.frame]
        return rows(spatial), rows(temporal)

    def positions(value: Tensor, shard: Shard) -> Tensor:
        return value[:, shard.frame] if value.shape[1] > 1 else value

    def clock(rope: Rope, shard: Shard) -> Rope:
        places = sum(shard.places)
        tokens = slice(shard.frame.start * places, shard.frame.stop * places)
        return rope[0][tokens], rope[1][tokens]

    def length(shard: Shard) -> int:
        return shard.latents.stop - shard.latents.start

    layers = [
        LayerCondition(
            text=(rows(told.text[0]), rows(told.text[1]), rows(told.text[2]), rows(told.text[3])),
            video_prior=priors(told.video_prior, video),
            audio_prior=priors(told.audio_prior, audio),
        )
        for told in condition.layers
    ]
    return replace(
        condition,
        layers=layers,
        text_mask=None if condition.text_mask is None else condition.text_mask[row],
        audio_text_mask=None if condition.audio_text_mask is None else condition.audio_text_mask[row],
        fps=condition.fps[row],
        video_positions=positions(condition.video_positions[row], video),
        audio_positions=positions(condition.audio_positions, audio),
        video_sizes=(length(video), *condition.video_sizes[1:]),
        audio_sizes=(length(audio), *condition.audio_sizes[1:]),
        clock=None if condition.clock is None else (clock(condition.clock[0], video), clock(condition.clock[1], audio)),
    )
