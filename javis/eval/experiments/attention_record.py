"""Attention probabilities of a model that runs, read by hooks that compute them beside the blocks.

The blocks and their ops stay as they are: a hook gets what enters a block and does the softmax once more, in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from javis.model.blocks import BidirectionalBlock, KeyValue, PriorAttention
from javis.model.dit import JavisDiT
from javis.model.ops import FoldedPrior, Rope

PRIOR_PICTURE, PRIOR_SOUND = "prior_picture", "prior_sound"
TO_PICTURE, TO_SOUND = "to_picture", "to_sound"


@dataclass
class Recorded:
    """Mean probabilities over the calls since the recorder began.

    Attributes:
        sums: name -> layer -> sum over calls. `PRIOR_PICTURE` and `PRIOR_SOUND`: of the spatial prior attention of the
            picture's and the sound's stream, [B, H, N, M] (softmax over M prior tokens). `TO_PICTURE` [B, H, Nv, Na]
            and `TO_SOUND` [B, H, Na, Nv]: of the bidirectional attention, softmax over the last axis.
        calls: name -> how many there were in each layer.
    """

    samples: int
    sums: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    calls: dict[str, dict[int, int]] = field(default_factory=dict)

    def add(self, name: str, layer: int, values: Tensor) -> None:
        sums, calls = self.sums.setdefault(name, {}), self.calls.setdefault(name, {})
        values = values[: self.samples]
        sums[layer] = sums[layer] + values if layer in sums else values.clone()
        calls[layer] = calls.get(layer, 0) + 1

    def mean(self, name: str) -> Tensor:
        """[B, layers, H, queries, keys].

        Raises:
            KeyError: no such attention ran.
        """
        sums, calls = self.sums[name], self.calls[name]
        return torch.stack([sums[layer] / calls[layer] for layer in sorted(sums)], dim=1)


@torch.no_grad()
def prior_probabilities(attention: PriorAttention, y: Tensor, told: Any) -> Tensor:
    """Softmax over the prior tokens, [B, H, N, M], for the modulated stream ``y`` [B, N, C].

    Raises:
        ValueError: the priors enter by addition or modulation: nothing attends to them.
    """
    if isinstance(told, FoldedPrior):
        heads = attention.attn.heads
        scores = (y @ told.scores_weight).float() + told.scores_bias[:, None]
        return scores.unflatten(-1, (heads, -1)).transpose(1, 2).softmax(-1)
    if isinstance(told, KeyValue):
        q = attention.attn.q(y).unflatten(-1, (attention.attn.heads, -1)).transpose(1, 2)
        return ((q * q.shape[-1] ** -0.5) @ told.k.transpose(-1, -2)).float().softmax(-1)
    raise ValueError(f"priors of mode {attention.mode!r} are not attended to; expected prior_mode cross_attn")


@torch.no_grad()
def bidirectional_probabilities(
    block: BidirectionalBlock, video: Tensor, audio: Tensor, clock: tuple[Rope, Rope] | None = None
) -> tuple[Tensor, Tensor]:
    """What picture tokens take from sound tokens [B, H, Nv, Na], and the other way round [B, H, Na, Nv]."""
    q_video, q_audio = block.video_q(block.video_norm(video)), block.audio_q(block.audio_norm(audio))
    if clock is not None:
        q_video, q_audio = block._rotate(q_video, clock[0]), block._rotate(q_audio, clock[1])
    qv, qa = (q.unflatten(-1, (block.heads, -1)).transpose(1, 2).float() for q in (q_video, q_audio))
    scores = (qv * qv.shape[-1] ** -0.5) @ qa.transpose(-1, -2)
    return scores.softmax(-1), scores.transpose(-1, -2).softmax(-1)


@contextlib.contextmanager
def recorded(model: JavisDiT, samples: int) -> Iterator[Recorded]:
    """Record while the model runs; hooks are taken off at the end.

    Args:
        model: with priors that are attended to, and with bidirectional attention.
        samples: the first so many of each batch; the unconditional half of guidance comes after them.
    """
    found = Recorded(samples)
    handles = []

    def prior(name: str, layer: int, module: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(module, PriorAttention)
        found.add(name, layer, prior_probabilities(module, given[0], given[1]))

    def bidirectional(layer: int, module: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(module, BidirectionalBlock)
        to_picture, to_sound = bidirectional_probabilities(module, *given)
        found.add(TO_PICTURE, layer, to_picture)
        found.add(TO_SOUND, layer, to_sound)

    for number, layer in enumerate(model._layers):
        for name, block in ((PRIOR_PICTURE, layer.video_prior), (PRIOR_SOUND, layer.audio_prior)):
            if block is not None:
                handles.append(block.spatial.register_forward_pre_hook(partial(prior, name, number)))
        if layer.bidirectional is not None:
            handles.append(layer.bidirectional.register_forward_pre_hook(partial(bidirectional, number)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
