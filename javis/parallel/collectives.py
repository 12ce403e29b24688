"""Exchanges between the processes of a group, for shards of unequal length. Inference only: no gradients.

Lengths that the group's size does not divide (15 frames over 2, 405 places over 4) are split unevenly, so there is no
padding in the model and nothing to mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


def split_sizes(length: int, parts: int) -> list[int]:
    """Lengths of ``parts`` shards, the longer ones first: 15 over 4 -> [4, 4, 4, 3]."""
    return [length // parts + (part < length % parts) for part in range(parts)]


def span(sizes: Sequence[int], part: int) -> slice:
    """Where shard ``part`` lies in the whole."""
    ends = list(accumulate(sizes))
    return slice(ends[part] - sizes[part], ends[part])


def exchange(
    x: Tensor, *, split: int, out_sizes: Sequence[int], join: int, in_sizes: Sequence[int], group: ProcessGroup
) -> Tensor:
    """All-to-all: give up one axis, get another one whole.

    Args:
        x: this rank's shard: its part, ``in_sizes[rank]``, of dimension ``join``, and all of dimension ``split``.
        split: dimension that is divided: rank j is sent its ``out_sizes[j]`` entries.
        join: dimension along which what rank i sent, ``in_sizes[i]`` entries, is put together.

    Returns:
        ``out_sizes[rank]`` entries along ``split`` and ``sum(in_sizes)`` along ``join``.
    """
    rank = dist.get_rank(group)
    pieces = x.split(list(out_sizes), dim=split)
    shapes = [list(x.shape) for _ in in_sizes]
    for shape, size in zip(shapes, in_sizes, strict=True):
        shape[split], shape[join] = out_sizes[rank], size
    counts = [math.prod(shape) for shape in shapes]
    received = x.new_empty(sum(counts))
    sent = torch.cat([piece.flatten() for piece in pieces])
    dist.all_to_all_single(received, sent, counts, [piece.numel() for piece in pieces], group=group)
    parts = zip(received.split(counts), shapes, strict=True)
    return torch.cat([part.view(shape) for part, shape in parts], dim=join)


def gather(x: Tensor, dim: int, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """Shards of ``sizes`` along ``dim`` -> the whole, on every rank. Shorter ones are padded on the way only."""
    longest = max(sizes)
    rows = x.movedim(dim, 0)
    rows = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, longest - len(rows)]).contiguous()
    every = rows.new_empty((len(sizes) * longest, *rows.shape[1:]))
    # torch 2.13 renamed it and warns of the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(every, rows, group=group)
    return torch.cat([part[:size] for part, size in zip(every.split(longest), sizes, strict=True)]).movedim(0, dim)
