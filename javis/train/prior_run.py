"""What ``javis train prior`` does: data, estimator, engine, and a checkpoint at the end.

The checkpoint OUT/checkpoint is that of --init with the new estimator in it. Where the priors have other sizes than its
transformer was made for, the transformer's parameters that depend on them start anew: stage 3 trains them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from javis.errors import UsageError
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.model.prior import PriorConfig, PriorEstimator
from javis.parallel.ranks import rank_from_env
from javis.train.engine import BatchSource, Trainer
from javis.train.prior_latents import build_negatives
from javis.train.prior_recipe import PriorRecipe
from javis.train.prior_task import NegativeBatches, PriorTask
from javis.world import WorldConfig

if TYPE_CHECKING:
    from javis.pipeline import JavisPipeline

log = logging.getLogger("javis.train")

# Of a small checkpoint: patches of the embedding network are slices of 0.25 s, whole in frequency, so that no latent
# is skipped when they are brought to the tokens (docs/negatives.md).
SMALL: dict[str, Any] = {
    "spatial_token_num": 16,
    "temporal_token_num": 8,
    "out_dim": 64,
    "hidden_size": 64,
    "video_patch": (2, 2, 2),
    "audio_patch": (4, 4),
}


def estimator_config(pipe: JavisPipeline, recipe: PriorRecipe) -> PriorConfig:
    """Sizes of the estimator that the recipe trains."""
    base = dataclasses.replace(pipe.prior.config, encode_va=True)
    if "components" not in pipe.description:
        base = dataclasses.replace(base, **SMALL)
    asked: dict[str, Any] = {
        "spatial_token_num": recipe.spatial_tokens,
        "temporal_token_num": recipe.temporal_tokens,
        "out_dim": recipe.channels,
    }
    try:
        return dataclasses.replace(base, **{name: value for name, value in asked.items() if value is not None})
    except ValueError as error:
        raise UsageError(f"the estimator cannot have these sizes: {error}") from error


def text_encoder(pipe: JavisPipeline) -> Callable[[list[str]], Tensor]:
    """Captions -> hidden states that the estimator reads."""

    def encode(captions: list[str]) -> Tensor:
        with torch.no_grad():
            return pipe.encode_text(captions, for_prior=True)[0].float().cpu()

    return encode


def load_init(name: str) -> JavisPipeline:
    """The pipeline whose encoders and codecs are used."""
    from javis.pipeline import JavisPipeline

    return JavisPipeline.from_pretrained(name, ops=ModelOps())


def run(recipe: PriorRecipe) -> Path:
    """Train; returns the folder of the checkpoint.

    Raises:
        UsageError: what cannot be trained on or written; FailedError: what the engine gives up on.
    """
    if recipe.data != "world":
        from javis.train.prior_feed import check_data

        check_data(recipe)
    pipe = load_init(recipe.init)
    config = estimator_config(pipe, recipe)
    torch.manual_seed(recipe.seed)
    estimator = PriorEstimator(config)
    resolved = {"stage": "prior", **_plain(dataclasses.asdict(recipe)), "estimator": _plain(config.to_dict())}
    with ExitStack() as stack:
        source = _source(recipe, pipe, config, stack)
        Trainer(PriorTask(estimator), source, recipe, resolved=resolved).run()
    folder = Path(recipe.out) / "checkpoint"
    if rank_from_env().rank == 0:
        with_estimator(pipe, estimator.cpu().eval()).save_pretrained(folder, overwrite=True)
    return folder


def world_format(pipe: JavisPipeline) -> WorldConfig:
    """Format of the world clips that a checkpoint is for.

    Raises:
        UsageError: a full-size checkpoint.
    """
    clip = pipe.description["clip"]
    if "size" not in clip:
        raise UsageError("clips of the world are for a small checkpoint; a full-size one needs a manifest of clips")
    return WorldConfig(size=clip["size"], fps=clip["fps"], seconds=clip["seconds"], sample_rate=clip["sample_rate"])


def _source(recipe: PriorRecipe, pipe: JavisPipeline, config: PriorConfig, stack: ExitStack) -> BatchSource:
    noise = (config.spatial_token_num + config.temporal_token_num, config.out_dim)
    place = rank_from_env()
    rank, world = place.rank, place.world
    if recipe.data != "world":
        from javis.train.prior_feed import FeederBatches
        from javis.train.recipes.sources import ClipEncoder
        from javis.train.recipes.start import clip_feeder

        _, feeder = clip_feeder(recipe, pipe, rank, world, device="cpu")  # where negatives are made
        stack.callback(feeder.close)
        encoder = ClipEncoder(pipe, "joint")
        return FeederBatches(encoder, feeder, text_encoder(pipe), noise, seed=recipe.seed, rank=rank)
    from javis.console import progress_bar

    format_ = world_format(pipe)
    folder = Path(recipe.out) / "latents"
    if rank == 0:
        with progress_bar("clips and negatives", recipe.clips) as advance:
            made = 0

            def progress(count: int) -> None:
                nonlocal made
                made += count
                advance(made)

            data = build_negatives(
                folder,
                pipe.video_codec,
                pipe.audio_codec,
                format_,
                clips=recipe.clips,
                seed=recipe.seed * 100_000_000,
                processes=recipe.processes,
                progress=progress,
            )
    else:
        from javis.train.prior_latents import NegativeSet, wait_for

        wait_for(folder)
        data = NegativeSet.open(folder)
    return NegativeBatches(
        data,
        text_encoder(pipe),
        noise,
        batch=recipe.batch,
        frame=(format_.size, format_.size),
        seed=recipe.seed,
        rank=rank,
        world=world,
    )


def with_estimator(pipe: JavisPipeline, estimator: PriorEstimator) -> JavisPipeline:
    """``pipe`` with another estimator; parameters of its transformer that no longer fit are drawn anew."""
    c = estimator.config
    pipe.prior = estimator
    if "prior" in pipe.description:
        pipe.description = {**pipe.description, "prior": _plain(c.to_dict())}
    sizes: dict[str, Any] = {
        "spatial_prior_len": c.spatial_token_num,
        "temporal_prior_len": c.temporal_token_num,
        "prior_channels": c.out_dim,
    }
    old = pipe.model
    if any(getattr(old.config, name) != value for name, value in sizes.items()):
        torch.manual_seed(0)
        model = JavisDiT(dataclasses.replace(old.config, **sizes), ModelOps())
        state = model.state_dict()
        fits = {name: x for name, x in old.state_dict().items() if name in state and state[name].shape == x.shape}
        model.load_state_dict({**state, **fits})
        pipe.model, pipe.student = model.eval(), None
        pipe.description = {k: v for k, v in pipe.description.items() if k != "student"}
        pipe.description["model"] = _plain(model.config.to_dict())
        log.info("the transformer's %d parameters of the prior start anew", len(state) - len(fits))
    return pipe


def _plain(value: Any) -> Any:
    """Json-able: tuples as lists, paths as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def main(recipe: PriorRecipe) -> int:
    """Command-line entry: train, then say where the checkpoint is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("checkpoint: %s", run(recipe))
    return 0
