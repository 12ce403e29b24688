"""``javis train overfit``: the self test of training. A small model learns one clip by heart and gives it back.

It goes the whole way: codecs, batches, the joint stage's loss, the engine, averaged weights, a checkpoint folder, and
``JavisPipeline`` sampling from noise. What comes out is compared with the clip itself, whose events are known exactly.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from javis.components import choose_device
from javis.console import output
from javis.data.feed import MediaBatch
from javis.errors import FailedError
from javis.eval.matching import count_events
from javis.eval.sync import PRIMARY, clause_events
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.parallel.ranks import Rank
from javis.pipeline import JavisPipeline
from javis.train.recipes.config import Draws, JointRecipe
from javis.train.recipes.parameters import freeze
from javis.train.recipes.run import Stage, train
from javis.train.recipes.sources import ClipEncoder, WorldSource, render
from javis.train.recipes.start import clip_format, load_components
from javis.train.recipes.task import FlowTask

log = logging.getLogger("javis.train")


@dataclass(frozen=True, kw_only=True)
class OverfitArgs:
    """Learn one clip by heart and get it back: a self test of training, minutes on a CPU. Exit code 1 below a bar."""

    out: Path = Path("runs/overfit")
    """Everything the run writes; a finished run is only judged again."""
    steps: int = 200
    """Steps of training."""
    batch: int = 2
    """Copies of the clip in a batch, each with its own noise."""
    seed: int = 0
    """Of the weights and of what is drawn."""
    clip: int = 3
    """Seed of the world's scene."""
    device: str = "cpu"
    """cpu or cuda."""
    psnr: float = 26.0
    """Least PSNR of the frames against the clip's own, in dB."""
    f1: float = 0.99
    """Least F1 of events heard and seen against the true ones, within 62.5 ms."""
    json: bool = False
    """Print the result as JSON."""


class OneClip(WorldSource):
    """The same clip again and again; what is drawn for it is new in every step."""

    scene = 0

    def media(self) -> MediaBatch:
        return render([self.scene] * self.batch, self.world)


def small_model(of: JavisDiTConfig) -> JavisDiTConfig:
    """A model that learns in minutes, for the built-in codecs and captions."""
    return replace(of, hidden_size=96, num_heads=4, depth=2, mlp_ratio=2.0)


def recipe_of(args: OverfitArgs) -> JointRecipe:
    """The joint stage with everything trained, nothing dropped and nothing given."""
    return JointRecipe(
        out=args.out,
        init="demo",
        fresh=True,
        train="all",
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        device="cuda" if args.device == "cuda" else "cpu",
        learning_rate=3e-3,
        warmup=20,
        schedule="cosine",
        decay=0.7,
        ema=0.9,
        save_every=0,
        log_every=max(1, args.steps // 10),
        draws=Draws(drop_text=0.0, drop_prior=0.0, shift=3.0, masks={}),
    )


def overfit(args: OverfitArgs) -> dict[str, Any]:
    """Train, sample, compare; returns what ``--json`` prints.

    Raises:
        UsageError: unusable arguments. FailedError: training or sampling went wrong.
    """
    recipe = recipe_of(args)
    device = choose_device(args.device)
    pipe = load_components("demo", device, seed=args.seed)
    torch.manual_seed(args.seed)
    pipe.model, pipe.student = JavisDiT(small_model(pipe.model.config)).to(device), None
    freeze(pipe.model, "joint", recipe.train)
    size, length = clip_format(pipe, recipe)
    source = OneClip(
        ClipEncoder(pipe, "joint"), recipe.draws, size=size, length=length, batch=args.batch, seed=args.seed
    )
    source.scene = args.clip
    began = time.perf_counter()
    folder = train(Stage(recipe, pipe, FlowTask(pipe.model, "joint"), source, [], Rank()))
    seconds = time.perf_counter() - began
    return judge(folder, source, args) | {"steps": args.steps, "train_seconds": round(seconds, 1)}


def judge(folder: Path, source: OneClip, args: OverfitArgs) -> dict[str, Any]:
    """Sample from the checkpoint and compare with the clip and with what the codec makes of it."""
    from javis.world import sample_scene

    pipe = JavisPipeline.from_pretrained(folder)
    truth = source.media()
    frames = truth.video[0].numpy()
    made = pipe(truth.captions[0], seed=1, steps=8, guidance=1.0, audio_guidance=1.0, order="together")
    with torch.no_grad():
        x = truth.video[:1].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        again = pipe.video_codec.decode(pipe.video_codec.encode(x), len(frames))
    codec = ((again[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    scene = sample_scene(args.clip, source.world, split="train")
    found = event_f1(scene, made.video[0], made.audio[0], made.fps, made.sample_rate)
    facts: dict[str, Any] = {
        "caption": truth.captions[0],
        "psnr_db": round(psnr(made.video[0], frames), 2),
        "codec_psnr_db": round(psnr(codec, frames), 2),
        **found,
        "bars": {"psnr_db": args.psnr, "f1": args.f1},
        "checkpoint": str(folder),
    }
    facts["passed"] = facts["psnr_db"] >= args.psnr and facts["f1_seen"] >= args.f1 and facts["f1_heard"] >= args.f1
    return facts


def event_f1(scene: Any, video: np.ndarray, audio: np.ndarray, fps: float, rate: int) -> dict[str, float]:
    """F1 of the events that are seen and of those that are heard in a clip against the scene's true ones."""
    told = clause_events(video, audio, fps, rate, [source.clause for source in scene.sources])
    counts = {"f1_seen": [0, 0], "f1_heard": [0, 0]}
    for source, (seen, heard) in zip(scene.sources, told, strict=True):
        times = [event.time for event in source.events]
        for name, there, wanted in (("f1_seen", seen, source.visible), ("f1_heard", heard, source.audible)):
            found = count_events(times if wanted else [], there, PRIMARY)
            counts[name][0] += found.matched
            counts[name][1] += found.reference + found.other
    return {name: round(2 * matched / events, 4) if events else 0.0 for name, (matched, events) in counts.items()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures with values 0..255."""
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def main(args: OverfitArgs) -> int:
    """Command-line entry; 1 if a bar is missed."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    facts = overfit(args)
    if args.json:
        output().print(json.dumps(facts, indent=1))
    else:
        output().print(
            f"{facts['caption']!r} after {facts['steps']} steps ({facts['train_seconds']:g} s): PSNR "
            f"{facts['psnr_db']:g} dB (the codec alone {facts['codec_psnr_db']:g}; bar {args.psnr:g}), event F1 seen "
            f"{facts['f1_seen']:g}, heard {facts['f1_heard']:g} (bar {args.f1:g})"
        )
    if not facts["passed"]:
        raise FailedError("the clip did not come back as it was: training or sampling is broken, or --steps too few")
    return 0
