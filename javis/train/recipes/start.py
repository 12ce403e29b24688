"""From which weights a stage starts: the components of a checkpoint, and the model that is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from javis.convert.read import Checkpoint
from javis.durations import ClipLength, clip_length
from javis.errors import UsageError
from javis.frame_size import FrameSize
from javis.generation import clip_size, codec_grid, seconds_range
from javis.model.checkpoint import official_names
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.train.ops import cpu_training_ops
from javis.train.recipes.config import AudioRecipe, FlowRecipe
from javis.train.recipes.parameters import audio_from_video, count, freeze

if TYPE_CHECKING:
    from javis.data.feed import Feeder, FeedPlan
    from javis.data.feeders import Backend
    from javis.data.manifest import Manifest
    from javis.pipeline import JavisPipeline

log = logging.getLogger("javis.train")


class ClipRecipe(Protocol):
    """What `clip_format` reads of a recipe."""

    @property
    def seconds(self) -> float | None: ...
    @property
    def resolution(self) -> str | None: ...
    @property
    def ratio(self) -> str | None: ...


class FileRecipe(ClipRecipe, Protocol):
    """What `clip_feeder` reads of a recipe."""

    @property
    def batch(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def data(self) -> str: ...
    @property
    def buckets(self) -> str | None: ...
    @property
    def feeder(self) -> Backend: ...


def load_components(init: str, device: torch.device, *, seed: int = 0) -> JavisPipeline:
    """The pipeline whose encoders and codecs a stage uses, and in which its model is exported.

    Raises:
        UsageError: no such checkpoint.
    """
    from javis.pipeline import JavisPipeline

    if init == "toy":
        return JavisPipeline.with_random_weights("toy", seed=seed, device=device, ops=ModelOps())
    return JavisPipeline.from_pretrained(init, device=device, ops=ModelOps())


def training_ops(device: torch.device, precision: str) -> ModelOps:
    """The kernels on a GPU; plain PyTorch on a CPU, with attention in float32 under autocast (javis/train/ops.py)."""
    if device.type == "cuda":
        return ModelOps.fused()
    return cpu_training_ops() if precision == "autocast" else ModelOps()


def training_model(pipe: JavisPipeline, recipe: FlowRecipe, ops: ModelOps | None = None) -> JavisDiT:
    """The model of a stage in float32: its starting weights, and ``requires_grad`` by the rules of the stage.

    It takes the place of ``pipe.model``.

    Raises:
        UsageError: weight files that are unusable or fit nothing, a stage that the model has no blocks for.
    """
    from javis.components import loader

    config, device = pipe.model.config, pipe.device
    if recipe.stage == "joint" and not (config.use_prior or config.use_bidirectional):
        raise UsageError(
            f"{recipe.init}: this model has neither prior blocks nor bidirectional attention (use_prior, "
            "use_bidirectional), which is what the joint stage trains"
        )
    if config.guidance_input or config.step_input:
        raise UsageError(f"{recipe.init}: this model is a distilled student; the stages train its teacher")
    torch.manual_seed(recipe.seed)  # random weights of a fresh model
    model = JavisDiT(config, ops or training_ops(device, recipe.precision))
    if not recipe.fresh:
        fill = loader(pipe.folder, "model") if "components" in pipe.description else None
        if fill is not None:
            fill(model, torch.device("cpu"))  # in float32, whatever the pipeline has it in
        else:
            model.load_state_dict({name: value.float() for name, value in pipe.model.state_dict().items()})
    pipe.model, pipe.student = model, None
    for path in recipe.weights:
        names = take_weights(model, path)
        log.info("%s: %d of %d parameters of the transformer", path, len(names), len(model.state_dict()))
    if isinstance(recipe, AudioRecipe) and recipe.audio_from == "video":
        copied = audio_from_video(model)
        log.info("audio branch: %d parameters start from the video branch", len(copied))
    with torch.no_grad():
        model.embed.audio_text.null.copy_(model.embed.video_text.null)  # one null caption, as officially
    trained = freeze(model, recipe.stage, recipe.train)
    every, some = count(model.parameters())
    log.info("trained: %.4g of %.4g million values in %d parameters", some / 1e6, every / 1e6, len(trained))
    return model.to(device)


@torch.no_grad()
def take_weights(model: JavisDiT, path: Path, only: Sequence[str] = ()) -> list[str]:
    """Take what a weight file has for the model, by name and shape; returns the names.

    Args:
        path: safetensors or a pickle of tensors, with official names (JavisDiT, Open-Sora's STDiT3) or ours.
        only: parameters to take; empty: all.

    Raises:
        UsageError: no such file, or nothing in it fits.
    """
    source = Checkpoint(path)
    own: dict[str, Tensor] = model.state_dict()
    given = source.names()
    renamed, _ = official_names(given)
    taken, other = [], []
    for name in given:
        ours = name if name in own else renamed.get(name)
        if ours is None or ours not in own or (only and ours not in only):
            continue
        if source.info(name).shape != tuple(own[ours].shape):
            other.append(ours)
            continue
        own[ours].copy_(source.get(name))
        taken.append(ours)
    if not taken:
        why = f"; {len(other)} names fit, but no shape ({other[0]})" if other else ""
        raise UsageError(f"{path} has no weights for this transformer{why}; expected JavisDiT or STDiT3 weights")
    return taken


def clip_format(pipe: JavisPipeline, recipe: ClipRecipe) -> tuple[FrameSize, ClipLength]:
    """Size and length of the clips: whole windows of the video codec.

    Raises:
        UsageError: a size or a length that this checkpoint cannot have.
    """
    clip = pipe.description["clip"]
    window, multiple = codec_grid(pipe.video_codec)
    size = clip_size(clip, recipe.resolution, recipe.ratio, multiple=multiple)
    seconds = clip["seconds"] if recipe.seconds is None else recipe.seconds
    limits = seconds_range(pipe.description)
    return size, clip_length(seconds, clip["fps"], int(clip["sample_rate"]), window=window, limits=limits)


def clip_feeder(
    recipe: FileRecipe, pipe: JavisPipeline, rank: int, world: int, *, device: str
) -> tuple[Manifest, Feeder]:
    """The clips of a manifest or of shards, and the feeder of share ``rank`` of ``world``, in sizes of the recipe's
    buckets or, without, of the checkpoint.

    Raises:
        UsageError: data that is not there or is not usable.
    """
    from javis.data.buckets import BucketPlan
    from javis.data.feeders import make_feeder
    from javis.data.shards import open_clips

    size, length = clip_format(pipe, recipe)
    manifest = open_clips(recipe.data)
    buckets = None if recipe.buckets is None else BucketPlan.parse(recipe.buckets, fps=float(length.fps))
    plan = feed_plan(recipe, size, length, rank, world, buckets=buckets, device=device)
    return manifest, make_feeder(manifest, plan, recipe.feeder)


def feed_plan(recipe: FileRecipe, size: FrameSize, length: ClipLength, rank: int, world: int, **more: Any) -> FeedPlan:
    """What a feeder decodes for a stage: clips of this size and length; ``more`` are further fields of the plan."""
    from javis.data.feed import FeedPlan

    return FeedPlan(
        num_frames=length.model_frames,
        height=size.height,
        width=size.width,
        fps=float(length.fps),
        batch=recipe.batch,
        seed=recipe.seed,
        sample_rate=length.sample_rate,
        rank=rank,
        world=world,
        **more,
    )
