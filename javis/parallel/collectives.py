"""Exchanges between the processes of a group, for shards of unequal length, with their gradients.

Lengths that the group's size does not divide (15 frames over 2, 405 places over 4) are split unevenly, so there is no
padding in the model and nothing to mask.

Every rank calls the same exchanges in the same order, in the backward pass as well. A gradient is that of one loss
which all ranks compute together: what one of them gets for its parameters is its share, and the sum over the group is
the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

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
        ``out_sizes[rank]`` entries along ``split`` and ``sum(in_sizes)`` along ``join``. Its gradient is the exchange
        back.
    """
    made: Tensor = _Exchange.apply(x, split, list(out_sizes), join, list(in_sizes), group)
    return made


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, split: int, out_sizes: list[int], join: int, in_sizes: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.back = join, in_sizes, split, out_sizes, group
        return _exchange(x, split, out_sizes, join, in_sizes, group)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(gradient, *ctx.back), None, None, None, None, None


def _exchange(
    x: Tensor, split: int, out_sizes: list[int], join: int, in_sizes: list[int], group: ProcessGroup
) -> Tensor:
    rank = dist.get_rank(group)
    pieces = x.split(out_sizes, dim=split)
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
    """Shards of ``sizes`` along ``dim`` -> the whole, on every rank. Shorter ones are padded on the way only.

    All ranks must go on with the whole in the same way, as with a result of which each computes the same loss: every
    rank's gradient is then that of the one loss already, and that of ``x`` is a slice of it; a sum over the ranks would
    count the loss as often as there are ranks. Where ranks do different things with the whole, the gradient is
    :func:`scatter_sum` of theirs.
    """
    made: Tensor = _Gather.apply(x, dim, list(sizes), group)
    return made


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.span = dim, span(sizes, dist.get_rank(group))
        longest = max(sizes)
        rows = x.movedim(dim, 0)
        rows = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, longest - len(rows)]).contiguous()
        every = rows.new_empty((len(sizes) * longest, *rows.shape[1:]))
        # torch 2.13 renamed it and warns of the old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(every, rows, group=group)
        parts = zip(every.split(longest), sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts]).movedim(0, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own = gradient.narrow(ctx.dim, ctx.span.start, ctx.span.stop - ctx.span.start)
        return own.contiguous(), None, None, None


def scatter_sum(x: Tensor, dim: int, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """This rank's part, ``sizes[rank]`` entries along ``dim``, of the sum of the ranks' ``x``: reduce-scatter.

    Added in at least single precision, and in the order of the ranks. Has no gradient: it is one.
    """
    own, parts = [1] * len(sizes), x.detach()[None]
    dim = dim % x.ndim + 1
    every = _exchange(parts, dim, list(sizes), 0, own, group)
    return every.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
