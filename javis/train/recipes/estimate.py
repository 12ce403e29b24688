"""``javis train audio|joint --dry-run``: memory and time of a step, predicted before anything loads.

The stage's own code runs without values (on the meta device) for one and for two layers: what autograd keeps for the
backward pass is counted as it is kept, products as they are dispatched, forward and backward, with the frozen parts
frozen. The rest of the layers adds the difference. Attention counts as the kernels do it: it keeps its inputs, its
output and a number for each query and head, and its backward pass is five products where the forward pass is two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from javis.component_specs import configurations
from javis.durations import clip_length
from javis.generation import clip_size, codec_grid, seconds_range
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.parallel.ranks import clip_groups, rank_from_env
from javis.plan import token_grid
from javis.plan_args import GBPS, TFLOPS, is_full_size
from javis.prediction import RESERVED
from javis.stages import COMPONENTS, Parts, checkpoint_parts, folder_parts, full_size_parts
from javis.train.recipes.config import FlowRecipe
from javis.train.recipes.parameters import count, freeze
from javis.train.recipes.task import FlowModule
from javis.work import step_work

BACKWARD = 2.5  # products of an attention's backward pass for each of its forward pass
# Bytes that a step of the optimizer reads and writes for each trained value: weight, gradient, two moments, average.
UPDATE_BYTES = 8 + 4 + 16 + 8


@dataclass(frozen=True)
class Traced:
    """One forward and backward pass of a model of some layers."""

    kept: int  # bytes that autograd keeps for the backward pass
    forward: int  # FLOPs of products outside of attention
    backward: int
    parameters: int  # values
    trained: int


class _Attention(torch.autograd.Function):
    """Stands for an attention kernel: keeps what one keeps, computes nothing."""

    @staticmethod
    def forward(ctx: Any, shapes: tuple[tuple[int, ...], ...], heads: int, *inputs: Tensor) -> Any:
        made = tuple(inputs[0].new_empty(shape) for shape in shapes)
        sums = [x.new_empty(*x.shape[:-1], heads, dtype=torch.float32) for x in made]
        ctx.save_for_backward(*inputs, *made, *sums)
        ctx.count = len(inputs)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *(torch.empty_like(x) for x in ctx.saved_tensors[: ctx.count])


class _Norm(torch.autograd.Function):
    """Stands for a fused norm: keeps the inputs of these numbers, and two numbers for each token."""

    @staticmethod
    def forward(ctx: Any, keep: tuple[int, ...], results: int, *inputs: Tensor) -> Any:
        """With two results the first one, the new residual stream, is kept, too."""
        x = inputs[0]
        made = tuple(torch.empty_like(x) for _ in range(results))
        ctx.shapes = [(i.shape, i.dtype, i.device) for i in inputs]
        sums = x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
        ctx.save_for_backward(*(inputs[i] for i in keep), *made[: results - 1], sums)
        return made if results > 1 else made[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *(torch.empty(s, dtype=d, device=v) for s, d, v in ctx.shapes)


def traced_ops() -> ModelOps:
    """Operations that keep what the kernels keep; products stay what they are."""

    def factorized(qkv: Tensor, axis: str, *, q_weight: Any = None, k_weight: Any = None, **_rest: Any) -> Tensor:
        b, t, s, _, heads, size = qkv.shape
        extra = [w for w in (q_weight, k_weight) if w is not None]
        found: Tensor = _Attention.apply(((b, t * s, heads * size),), heads, qkv, *extra)[0]
        return found

    def cross(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        found: Tensor = _Attention.apply((tuple(q.shape),), k.shape[1], q, k, v)[0]
        return found

    def bidirectional(qv: Tensor, qa: Tensor, vv: Tensor, va: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        video, audio = _Attention.apply((tuple(qv.shape), tuple(qa.shape)), heads, qv, qa, vv, va)
        return video, audio

    def norm(x: Tensor, shift: Tensor, scale: Tensor, **_: Any) -> Tensor:
        found: Tensor = _Norm.apply((0, 2), 1, x, shift, scale)
        return found

    def joined(
        x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        if gate is None:
            r, y = _Norm.apply((3,), 2, x, h, shift, scale)
        else:
            r, y = _Norm.apply((1, 2, 4), 2, x, h, gate, shift, scale)
        return r, y

    return ModelOps(
        ada_layer_norm=norm,
        gated_residual_ada_layer_norm=joined,
        factorized_attention=factorized,
        text_cross_attention=cross,
        prior_injection=cross,
        bidirectional_attention=bidirectional,
    )


def trace_step(
    config: JavisDiTConfig,
    recipe: FlowRecipe,
    video: tuple[int, int, int],
    audio: tuple[int, int],
    dtype: torch.dtype,
    ops: Callable[[], ModelOps] = traced_ops,
) -> Traced:
    """One step of the stage on a model of this configuration, without values.

    Args:
        video, audio: sizes of the latents. dtype: that the model computes in.
    """
    with torch.device("meta"):
        model = JavisDiT(config, ops()).to(dtype)
        freeze(model, recipe.stage, recipe.train)
        module = FlowModule(model, recipe.stage)
        b, c = recipe.batch, config
        latents: dict[str, Any] = {
            "audio": torch.empty(b, c.audio_channels, *audio), "audio_noise": torch.empty(b, c.audio_channels, *audio),
            "video_sizes": video, "text": torch.empty(b, c.caption_length, c.caption_channels), "text_mask": None,
            **{name: torch.empty(b, dtype=torch.bool) for name in ("drop_text", "drop_audio_text", "drop_prior")},
            **{name: torch.empty(b) for name in ("t", "fps", "height", "width")},
        }  # fmt: skip
        if recipe.stage == "joint":
            latents |= {name: torch.empty(b, c.video_channels, *video) for name in ("video", "video_noise")}
            latents["spatial_prior"] = torch.empty(b, c.spatial_prior_len, c.prior_channels)
            latents["temporal_prior"] = torch.empty(b, c.temporal_prior_len, c.prior_channels)
    # What autograd keeps, once for each storage; weights are counted elsewhere.
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # or a later tensor may get the same storage

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), FlopCounterMode(display=False) as flops:
        loss = module(latents)["loss"]
        forward = flops.get_total_flops()
        loss.backward()
    return Traced(sum(kept.values()), forward, flops.get_total_flops() - forward, *count(model.parameters()))


def parts_for(init: str, dtype: torch.dtype) -> Parts:
    """Components of ``--init`` without values."""
    if init in ("toy", "official"):
        return full_size_parts(configurations("toy" if init == "toy" else "full"), dtype)
    return folder_parts(Path(init), dtype) if is_full_size(init) else checkpoint_parts(init)


def encoder_bytes(parts: Parts) -> int:
    """Bytes of everything but the transformer."""
    modules = [getattr(parts, name) for name in COMPONENTS if name != "model"]
    tensors = [x for m in modules if isinstance(m, torch.nn.Module) for x in (*m.parameters(), *m.buffers())]
    return sum(x.nbytes for x in {id(x): x for x in tensors}.values())


def estimate(recipe: FlowRecipe) -> dict[str, Any]:
    """What ``--dry-run`` prints, as json values; a prediction.

    Raises:
        UsageError: no such checkpoint, a size that it cannot have, or a number of processes that sequence_parallel does
            not divide.
    """
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    parts, world, seq = parts_for(recipe.init, dtype), rank_from_env().world, recipe.sequence_parallel
    world = seq if world == 1 else world  # asked by itself, it is about the fewest processes that it takes
    groups = clip_groups(world, 1, seq)
    config = parts.config
    clip, size, length = _clip(recipe, parts)
    video = parts.video_codec.latent_sizes(length.model_frames, *size)
    audio = parts.audio_codec.latent_sizes(length.model_samples)
    grid = token_grid(config, video, audio)
    one, two = (trace_step(dataclasses.replace(config, depth=n), recipe, video, audio, dtype) for n in (1, 2))

    def whole(name: str) -> int:
        first, second = getattr(one, name), getattr(two, name)
        return int(first + (config.depth - 1) * (second - first))

    layer, b = two.kept - one.kept, recipe.batch
    tokens = grid.audio + (grid.video if recipe.stage == "joint" else 0)
    entering = config.depth * b * tokens * config.hidden_size * dtype.itemsize
    # What belongs to no token, captions and priors, is made on every process, but that is little.
    kept = {"none": whole("kept") / seq, "full": (one.kept - layer + entering + layer) / seq}
    work = [
        w
        for w in step_work(config, grid, batch=b, folded=False, dtype=dtype)
        if recipe.stage == "joint" or (w.stage == "audio" and w.kind != "prior_attention")
    ]
    attention = sum(w.flops for w in work if w.kind.endswith("attention"))
    moved = sum(w.bytes for w in work if w.kind == "elementwise")
    forward, backward = (whole("forward") + attention) / seq, (whole("backward") + BACKWARD * attention) / seq
    again = 0 if recipe.activation_checkpointing == "none" else forward
    every, trained = whole("parameters"), whole("trained")
    shards = max(1, world // recipe.replicas) if recipe.sharding != "none" else 1
    gb = {
        "weights": 4 * every / shards / 1e9,
        "gathered": 0.0 if dtype == torch.float32 else 2 * 2 * every / max(1, config.depth) / 1e9,
        "gradients": 4 * trained / shards / 1e9,
        "moments": 8 * trained / shards / 1e9,
        "average": (4 * trained / shards / 1e9) if recipe.ema else 0.0,
        "encoders": encoder_bytes(parts) / 1e9,
        "activations": kept["none" if recipe.activation_checkpointing == "none" else "full"] / 1e9,
    }
    passes = 3 if again == 0 else 4
    update = trained / shards * UPDATE_BYTES / GBPS / 1e9
    seconds = (
        recipe.accumulation * ((forward + backward + again) / TFLOPS / 1e12 + passes * moved / seq / GBPS / 1e9)
        + update
    )
    clips = recipe.batch * recipe.accumulation * groups
    peak = math.fsum(gb.values())
    return {
        "prediction": True,
        "stage": recipe.stage,
        "init": recipe.init,
        "clip": clip,
        "batch": b,
        "clips_per_step": clips,
        "processes": world,
        "sequence_parallel": seq,
        "tokens_per_clip": {"video": grid.video, "audio": grid.audio},
        "parameters": {"all": every, "trained": trained},
        "precision": recipe.precision,
        "activation_checkpointing": recipe.activation_checkpointing,
        "memory_gb": gb | {"peak": peak},
        "activations_gb": {name: value / 1e9 for name, value in kept.items()},
        "card_gb": recipe.gpu_memory,
        "fits": peak + RESERVED / 1e9 <= recipe.gpu_memory,
        "tflop_per_step": {
            "forward": recipe.accumulation * forward / 1e12,
            "backward": recipe.accumulation * backward / 1e12,
            "recompute": recipe.accumulation * again / 1e12,
        },
        "seconds_per_step": seconds,
        "clips_per_second": clips / seconds,
        "assumed": {"tflops": TFLOPS, "gb_per_s": GBPS},
    }


def _clip(recipe: FlowRecipe, parts: Parts) -> tuple[dict[str, Any], Any, Any]:
    """The clip as json values, its frame size and its length."""
    description = _description(recipe.init)
    window, multiple = codec_grid(parts.video_codec)
    size = clip_size(description["clip"], recipe.resolution, recipe.ratio, multiple=multiple)
    clip = description["clip"]
    seconds = clip["seconds"] if recipe.seconds is None else recipe.seconds
    length = clip_length(
        seconds, clip["fps"], int(clip["sample_rate"]), window=window, limits=seconds_range(description)
    )
    told = {"height": size.height, "width": size.width, "frames": length.model_frames, "fps": length.fps}
    return told, size, length


def _description(init: str) -> dict[str, Any]:
    """The "clip" part of a checkpoint's description."""
    import json

    from javis.components import CLIP, INDEX
    from javis.demo_checkpoint import DEMO_FOLDER

    if init == "official":
        return {"clip": dict(CLIP)}
    if init == "toy":
        return {"clip": CLIP | {"resolution": "64x64", "seconds": 0.5}}
    folder = DEMO_FOLDER if init == "demo" else Path(init)
    name = INDEX if is_full_size(init) else "config.json"
    given = json.loads((folder / name).read_text(encoding="utf-8"))
    return {"clip": (dict(CLIP) if name == INDEX else {}) | given.get("clip", {})}


def lines(facts: dict[str, Any]) -> list[str]:
    """The same for people."""
    clip, gb, p = facts["clip"], facts["memory_gb"], facts["parameters"]
    flop, tokens = facts["tflop_per_step"], facts["tokens_per_clip"]
    fits = "fits" if facts["fits"] else "does not fit"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in gb.items() if name != "peak")
    return [
        f"stage      {facts['stage']} from {facts['init']}: {p['trained'] / 1e6:.4g} of {p['all'] / 1e6:.4g} million "
        "values are trained",
        f"clips      {facts['clips_per_step']} a step ({facts['batch']} in a batch), {clip['frames']} frames of "
        f"{clip['width']}x{clip['height']} at {clip['fps']:g} fps: {tokens['video']} video and {tokens['audio']} audio "
        "tokens",
        f"memory     {gb['peak']:.3g} GB of a process at {facts['precision']}, predicted: {parts}",
        f"           activations without checkpointing {facts['activations_gb']['none']:.3g} GB, with full "
        f"{facts['activations_gb']['full']:.3g} GB; this {fits} into {facts['card_gb']:g} GB",
        f"time       {facts['seconds_per_step']:.3g} s a step, {facts['clips_per_second']:.3g} clips/s, predicted: "
        f"{flop['forward']:.4g} + {flop['backward']:.4g} + {flop['recompute']:.4g} TFLOP (forward, backward, computed "
        f"again) at {facts['assumed']['tflops']:g} TFLOP/s and {facts['assumed']['gb_per_s']:g} GB/s; encoding the "
        "clips is not in it",
    ]
