"""``javis train audio`` and ``javis train joint``: from a recipe to a checkpoint that samples."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from javis.components import choose_device
from javis.console import output
from javis.data.shards import holds_clips
from javis.errors import UsageError
from javis.parallel.ranks import Rank, data_place, rank_from_env
from javis.pipeline import JavisPipeline
from javis.train.engine import BatchSource, Trainer
from javis.train.recipes.config import Draws, FlowRecipe
from javis.train.recipes.sources import ClipEncoder, FeederSource, StoredSource, WorldSource, render
from javis.train.recipes.start import clip_feeder, clip_format, load_components, training_model
from javis.train.recipes.task import FlowTask
from javis.train.recipes.watch import Board, Export, Progress, Samples, Watcher

log = logging.getLogger("javis.train")
CHECKPOINT = "checkpoint"  # folder of a finished stage, below --out


@dataclass
class Stage:
    """A recipe with everything that it names: ready to be trained."""

    recipe: FlowRecipe
    pipe: JavisPipeline
    task: FlowTask
    source: BatchSource
    prompts: list[str]
    place: Rank


def device_of(recipe: FlowRecipe, place: Rank) -> torch.device:
    """Where this process works."""
    if recipe.device == "cpu" or (recipe.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return choose_device(f"cuda:{place.local_rank}")


@contextlib.contextmanager
def prepared(recipe: FlowRecipe) -> Iterator[Stage]:
    """Components, model and data of a recipe; a feeder is closed at the end.

    Raises:
        UsageError: what the recipe names is not there or does not fit.
    """
    place = rank_from_env()
    pipe = load_components(recipe.init, device_of(recipe, place), seed=recipe.seed)
    if pipe.residency.policy != "all":
        raise UsageError("training needs all components on the device")
    model = training_model(pipe, recipe)
    task = FlowTask(model, recipe.stage)
    with contextlib.ExitStack() as stack:
        source, captions = make_source(recipe, pipe, data_place(place, recipe.sequence_parallel), stack)
        yield Stage(recipe, pipe, task, source, list(recipe.prompts) or captions, place)


def make_source(
    recipe: FlowRecipe, pipe: JavisPipeline, place: Rank, stack: contextlib.ExitStack
) -> tuple[BatchSource, list[str]]:
    """The batches of a share of the data, and two captions of the data.

    Args:
        place: of the share among all (:func:`javis.parallel.ranks.data_place`).

    Raises:
        UsageError: data that is not there, is not usable or does not fit the checkpoint.
    """
    encoder = ClipEncoder(pipe, recipe.stage)
    draws = draws_for(pipe, recipe.draws)
    common: dict[str, Any] = {"seed": recipe.seed, "rank": place.rank}
    if recipe.data == "world":
        size, length = clip_format(pipe, recipe)
        world = WorldSource(encoder, draws, size=size, length=length, batch=recipe.batch, **common)
        return world, render([0, 1], world.world).captions
    if holds_clips(recipe.data):
        manifest, feeder = clip_feeder(recipe, pipe, place.rank, place.world, device=str(pipe.device))
        stack.callback(feeder.close)
        return FeederSource(encoder, feeder, draws, **common), [row.text for row in manifest[:2]]
    if "://" in recipe.data or Path(recipe.data).is_dir():
        from javis.data.latent_source import LatentSource

        latents = LatentSource(
            recipe.data, batch=recipe.batch, seed=recipe.seed, rank=place.rank, world=place.world, check=True
        )
        captions = [clip["caption"] for clip in latents.records[0]["clips"][:2]]
        return StoredSource(encoder, latents, draws, **common), captions
    raise UsageError(f"data {recipe.data!r}: expected a manifest (.csv), shards, encoded clips, or 'world'")


def draws_for(pipe: JavisPipeline, draws: Draws) -> Draws:
    """The shift of the timesteps that a checkpoint samples with, if it names one and no other was asked for."""
    own = pipe.description["sampling"].get("timestep_ratio")
    return draws if draws.shift is not None or own is None else dataclasses.replace(draws, shift=float(own))


def watchers(stage: Stage) -> list[Watcher]:
    """What is shown and written beside the engine's own checkpoints and log."""
    recipe, pipe, place = stage.recipe, stage.pipe, stage.place
    facts = {"stage": recipe.stage, "init": recipe.init, "data": recipe.data}
    export = Export(pipe, Path(recipe.out) / CHECKPOINT, recipe.steps, facts, place.rank)
    if place.rank:
        return [export]
    folder = Path(recipe.out) / "tensorboard" if recipe.tensorboard else None
    board = Board(folder, stage.task.module, project=recipe.wandb, resolved=recipe.resolved(), out=Path(recipe.out))
    options: dict[str, Any] = {"steps": recipe.sample_steps}
    if recipe.seconds is not None:
        options["seconds"] = recipe.seconds
    if recipe.resolution is not None:
        options |= {"resolution": recipe.resolution, "ratio": recipe.ratio}
    samples = Samples(
        pipe, Path(recipe.out) / "samples", stage.prompts, every=recipe.sample_every, board=board, options=options
    )
    clips = recipe.batch * recipe.accumulation * data_place(place, recipe.sequence_parallel).world
    return [Progress(f"{recipe.stage} stage", recipe.steps, clips), board, samples, export]


def train(stage: Stage, callbacks: list[Watcher] | None = None) -> Path:
    """Train a prepared stage; returns the checkpoint folder of the finished stage."""
    recipe = stage.recipe
    watching = watchers(stage) if callbacks is None else callbacks
    # The engine calls for samples at the last step, with averaged and whole weights: that is what is exported.
    config = dataclasses.replace(recipe, sample_every=recipe.sample_every or recipe.steps)
    try:
        Trainer(stage.task, stage.source, config, watching, resolved={"recipe": recipe.resolved()}).run()
    finally:
        for watcher in watching:
            watcher.close()
    return Path(recipe.out) / CHECKPOINT


def run(recipe: FlowRecipe) -> Path:
    """Train the stage of a recipe; returns the checkpoint folder.

    Raises:
        UsageError: what cannot run. FailedError: training that went wrong.
    """
    with prepared(recipe) as stage:
        return train(stage)


def main(recipe: FlowRecipe) -> int:
    """Command-line entry."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if recipe.dry_run:
        from javis.train.recipes.estimate import estimate, lines

        facts = estimate(recipe)
        output().print(json.dumps(facts, indent=1) if recipe.json else "\n".join(lines(facts)))
        return 0
    folder = run(recipe)
    if rank_from_env().rank == 0:
        output().print(f"checkpoint: {folder}")
    return 0
