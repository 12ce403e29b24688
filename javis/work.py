"""FLOPs and bytes of a denoising step, call by call: the one count that ``javis plan`` and the benchmarks share.

A step is listed as the calls that the model makes. What an op costs is what its case says (``ops/<op>/cases.py``, the
same that the microbenchmarks state speeds by); residuals, which are no op of ours, are counted here.
Counts are of the algorithm: each input read once, each output written once, weights included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from javis.kernels.cases import OpCase
from javis.kernels.ops.ada_layer_norm.cases import AdaLayerNormCase
from javis.kernels.ops.bidirectional_attention.cases import BidirectionalAttentionCase
from javis.kernels.ops.factorized_attention.cases import FactorizedAttentionCase
from javis.kernels.ops.folded_prior_injection.cases import FoldedPriorCase
from javis.kernels.ops.gated_residual_ada_layer_norm.cases import GatedResidualAdaLayerNormCase
from javis.kernels.ops.gelu_linear.cases import GeluLinearCase
from javis.kernels.ops.linear.cases import LinearCase
from javis.kernels.ops.prior_injection.cases import CrossAttentionCase
from javis.kernels.ops.text_cross_attention.cases import TextCrossAttentionCase
from javis.model.config import JavisDiTConfig

if TYPE_CHECKING:
    from javis.plan import Grid


@dataclass(frozen=True, kw_only=True)
class Work:
    """Equal calls of one operation in a step; FLOPs and bytes are those of all of them."""

    op: str  # of the registry, or "residual", "layer_norm", or "embedding": a linear layer outside of the layers
    kind: str  # as `step_flops` sums: linear, spatial_attention, ..., or elementwise (no matrix product)
    stage: str  # video, audio, joint: whose tokens
    calls: int
    flops: int
    bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time: arithmetic and memory traffic may overlap, and neither is faster than the machine."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def prior_axes(config: JavisDiTConfig) -> list[tuple[int, bool]]:
    """Of the spatial and the temporal prior step: tokens, and whether sampling folds the projections into them."""
    c, heads = config.hidden_size, config.num_heads
    if not config.use_prior or config.prior_mode != "cross_attn":
        return []
    return [(m, heads * m < c + m) for m in (config.spatial_prior_len, config.temporal_prior_len)]


@dataclass(frozen=True)
class _Counter:
    """Makes the entries of one step. A layer's are counted once and multiplied."""

    config: JavisDiTConfig
    batch: int
    dtype: torch.dtype

    def op(self, kind: str, stage: str, case: OpCase, name: str, per_layer: int = 1, *, once: bool = False) -> Work:
        calls = per_layer * (1 if once else self.config.depth)
        return Work(
            op=name, kind=kind, stage=stage, calls=calls, flops=calls * case.flops(), bytes=calls * case.bytes()
        )

    def linear(self, stage: str, rows: int, size_in: int, size_out: int, calls: int | None = None) -> Work:
        case = LinearCase(name=stage, dtype=self.dtype, tokens=rows, width=size_in, out=size_out)
        if calls is None:
            return self.op("linear", stage, case, "linear")
        return self.op("linear", stage, case, "embedding", calls, once=True)

    def norm(self, stage: str, frames: int, places: int) -> AdaLayerNormCase:
        width = self.config.hidden_size
        return AdaLayerNormCase(
            name=stage, dtype=self.dtype, batch=self.batch, frames=frames, places=places, width=width
        )

    def residual(self, stage: str, rows: int, per_layer: int) -> Work:
        calls, values = per_layer * self.config.depth, rows * self.config.hidden_size
        return Work(
            op="residual",
            kind="elementwise",
            stage=stage,
            calls=calls,
            flops=calls * 2 * values,
            bytes=calls * 3 * values * self.dtype.itemsize,
        )

    def stream(self, stage: str, frames: int, places: int, text: int, folded: bool) -> Iterator[Work]:
        """The spatial, the temporal and the prior block of one stream."""
        c, tokens = self.config, frames * places
        rows, width, heads = self.batch * tokens, c.hidden_size, c.num_heads
        grid: dict[str, Any] = {
            "batch": self.batch,
            "frames": frames,
            "places": places,
            "dtype": self.dtype,
            "name": stage,
        }
        flat: dict[str, Any] = {"batch": self.batch, "tokens": tokens, "dtype": self.dtype, "name": stage}
        attention: dict[str, Any] = {"heads": heads, "size": c.head_size}
        norm, joined = self.norm(stage, frames, places), GatedResidualAdaLayerNormCase(**grid, width=width)
        yield self.op("elementwise", stage, norm, "ada_layer_norm", 2)
        yield from 2 * [self.linear(stage, rows, width, 3 * width)]
        for axis in ("spatial", "temporal"):
            own = FactorizedAttentionCase(**grid, **attention, axis=axis, norm=c.qk_norm, rope=axis == "temporal")
            yield self.op(f"{axis}_attention", stage, own, "factorized_attention")
        yield from 2 * [self.linear(stage, rows, width, width)]
        told = TextCrossAttentionCase(**flat, **attention, keys=text)
        yield from 4 * [self.linear(stage, rows, width, width)]  # captions: queries and output
        yield self.op("text_attention", stage, told, "text_cross_attention", 2)
        ungated = GatedResidualAdaLayerNormCase(**grid, width=width, gated=False)
        yield self.op("elementwise", stage, ungated, "gated_residual_ada_layer_norm", 2)
        mlps = 3 if c.use_prior else 2
        yield self.op("linear", stage, GeluLinearCase(**flat, width=width, out=c.mlp_size), "gelu_linear", mlps)
        yield from mlps * [self.linear(stage, rows, c.mlp_size, width)]
        yield self.residual(stage, rows, 2 * 2 + (1 if c.use_prior else 0))
        if not c.use_prior:
            return
        yield self.op("elementwise", stage, norm, "ada_layer_norm")
        yield self.op("elementwise", stage, joined, "gated_residual_ada_layer_norm", 2)
        for keys, worth_it in prior_axes(c):
            if worth_it and folded:
                folded_prior = FoldedPriorCase(**flat, **attention, keys=keys)
                yield self.op("prior_attention", stage, folded_prior, "folded_prior_injection")
            else:
                yield from 2 * [self.linear(stage, rows, width, width)]
                prior = CrossAttentionCase(**flat, **attention, keys=keys)
                yield self.op("prior_attention", stage, prior, "prior_injection")

    def joint(self, grid: Grid) -> Iterator[Work]:
        """The attention between the streams, and what comes before and after the layers."""
        c, inner = self.config, self.config.bidirectional_size
        if c.use_bidirectional:
            for stage, tokens in (("video", grid.video), ("audio", grid.audio)):
                yield from 2 * [self.linear(stage, self.batch * tokens, c.hidden_size, inner)]
                yield self.linear(stage, self.batch * tokens, inner, c.hidden_size)
                # The plain norm before it is counted like a modulated one.
                yield self.op("elementwise", stage, self.norm(stage, 1, tokens), "layer_norm")
                yield self.residual(stage, self.batch * tokens, 1)
            case = BidirectionalAttentionCase(
                name="joint", dtype=self.dtype, batch=self.batch, video=grid.video, audio=grid.audio,
                heads=c.bidirectional_heads, size=inner // c.bidirectional_heads,
            )  # fmt: skip
            yield self.op("bidirectional_attention", "joint", case, "bidirectional_attention")
        for stage, tokens, patch, size_in, size_out in (
            ("video", grid.video, c.video_patch, c.video_channels, c.video_out_channels),
            ("audio", grid.audio, c.audio_patch, c.audio_channels, c.audio_out_channels),
        ):
            yield self.op("elementwise", stage, self.norm(stage, 1, tokens), "ada_layer_norm", once=True)
            for channels in (size_in, size_out):  # as a convolution, and back to patches
                yield self.linear(stage, self.batch * tokens, math.prod(patch) * channels, c.hidden_size, calls=1)
        for size_in, size_out in (
            (256, c.hidden_size),
            (c.hidden_size, c.hidden_size),
            (c.hidden_size, 6 * c.hidden_size),
            *([(c.hidden_size, 9 * c.hidden_size)] if c.use_prior else []),
        ):
            yield self.linear("joint", self.batch, size_in, size_out, calls=1)


def step_work(
    config: JavisDiTConfig,
    grid: Grid,
    *,
    batch: int = 1,
    text: int | None = None,
    folded: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Work]:
    """What one ``denoise`` of ``batch`` samples does; arguments as in `javis.plan.step_flops`."""
    count = _Counter(config, batch, dtype)
    text = config.caption_length if text is None else text
    return [
        *count.stream("video", grid.video_frames, grid.video_places, text, folded),
        *count.stream("audio", grid.audio_frames, grid.audio_places, text, folded),
        *count.joint(grid),
    ]


def total(work: Sequence[Work]) -> tuple[int, int]:
    """FLOPs of the matrix products, and bytes of everything."""
    return sum(w.flops for w in work if w.kind != "elementwise"), sum(w.bytes for w in work)


def floor_seconds(work: Sequence[Work], flops_per_s: float, bytes_per_s: float) -> float:
    """The roofline of a step: each call at the speed of what holds it back, one after another."""
    return sum(w.seconds(flops_per_s, bytes_per_s) for w in work)
