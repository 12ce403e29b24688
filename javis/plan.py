"""``javis plan``: tokens, FLOPs, memory and seconds of a clip before anything loads.

Memory and time of every stage come from `javis.stages`, which runs the components without values. The closed forms of
the denoising here are the count that the benchmarks state speeds by. FLOPs are those of matrix products, two for each
multiply-add. They count what the algorithm needs (unique prior keys, one score matrix for both directions of the
bidirectional attention, text keys and values once per clip), and beside it what the official code computes, which
repeats the prior tokens and attends over the batch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import javis
from javis.console import output
from javis.errors import UsageError
from javis.model.config import JavisDiTConfig
from javis.plan_args import GBPS, TFLOPS, PlanArgs, is_full_size

VAE_CHUNK, VAE_CHUNK_LATENTS, VAE_TIME, VAE_SPACE = (
    17,
    5,
    4,
    8,
)  # official video VAE: 17 frames -> 5 latents, 8x8 pixels


@dataclass(frozen=True)
class Grid:
    """Tokens of a clip. Video: T frames of S places; audio: the same with S mel rows."""

    video_frames: int
    video_places: int
    audio_frames: int
    audio_places: int

    @property
    def video(self) -> int:
        return self.video_frames * self.video_places

    @property
    def audio(self) -> int:
        return self.audio_frames * self.audio_places


def official_latents(frames: int, height: int, width: int, fps: float) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Sizes of the latents of the official VAEs: (T, H, W) of the video, (Ta, M) of the audio."""
    from javis.data.sizes import audio_latent_shape

    chunks, rest = divmod(frames, VAE_CHUNK)
    video = (chunks * VAE_CHUNK_LATENTS + math.ceil(rest / VAE_TIME), height // VAE_SPACE, width // VAE_SPACE)
    time, mel = audio_latent_shape(frames / fps)[2:]
    return video, (time, mel)


def official_grid(config: JavisDiTConfig, frames: int, height: int, width: int, fps: float) -> Grid:
    """Tokens of ``frames`` frames of ``height`` x ``width`` pixels with the official VAEs.

    51 frames of 720x1280 at 24 fps are 15 latents of 90x160, hence 15 x 3600 video tokens, and 14 x 16 audio tokens.
    """
    return token_grid(config, *official_latents(frames, height, width, fps))


def token_grid(config: JavisDiTConfig, video: tuple[int, int, int], audio: tuple[int, int]) -> Grid:
    """Tokens of latents of these sizes; incomplete patches count as whole ones."""
    t, h, w = (math.ceil(n / p) for n, p in zip(video, config.video_patch, strict=True))
    ta, m = (math.ceil(n / p) for n, p in zip(audio, config.audio_patch, strict=True))
    return Grid(t, h * w, ta, m)


def step_flops(
    config: JavisDiTConfig, grid: Grid, *, batch: int = 1, text: int | None = None, folded: bool = True
) -> dict[str, int]:
    """FLOPs of the matrix products of one ``denoise`` of ``batch`` samples (two for a clip with guidance), by kind.

    The sum of `javis.work.step_work`. ``text``: caption tokens, the longest caption by default. ``folded``: priors are
    folded where sampling does so; False is what training computes.
    """
    from javis.work import step_work

    kinds = ("linear", *(f"{name}_attention" for name in ("spatial", "temporal", "text", "prior", "bidirectional")))
    work = step_work(config, grid, batch=batch, text=text, folded=folded)
    return {kind: sum(w.flops for w in work if w.kind == kind) for kind in kinds}


def condition_flops(config: JavisDiTConfig, grid: Grid, *, batch: int = 1, text: int | None = None) -> int:
    """FLOPs of one ``condition`` of ``batch`` samples: embeddings, and keys and values of all layers.

    Where priors are added or modulate, they are stretched to the places and frames of each stream first.
    """
    from javis.work import prior_axes

    c, text = config.hidden_size, config.caption_length if text is None else text
    macs = 2 * text * (config.caption_channels * c + c * c) + config.depth * 4 * text * 2 * c * c
    macs += 256 * c + c * c  # frames per second
    if config.use_prior:
        tokens = config.spatial_prior_len + config.temporal_prior_len
        macs += tokens * (config.prior_channels * c + c * c)
        if config.prior_mode == "cross_attn":
            macs += config.depth * 2 * tokens * 2 * c * c
            folded = sum(m for m, is_folded in prior_axes(config) if is_folded)
            macs += config.depth * 2 * folded * (2 * c * c + c)  # query and output projection, and the query's bias
        else:
            stretched = grid.video_frames + grid.video_places + grid.audio_frames + grid.audio_places
            macs += config.depth * stretched * (1 if config.prior_mode == "addition" else 2) * c * c
    return 2 * batch * macs


def official_extra_flops(config: JavisDiTConfig, grid: Grid, *, batch: int = 2) -> int:
    """What the official code computes beyond `step_flops` in each step, at ``batch`` samples.

    It folds no prior, repeats the spatial prior tokens for every frame and the temporal ones for every place, projects
    them again in every layer, attends over the whole batch, and projects the caption's keys and values anew.
    """
    if not config.use_prior or config.prior_mode != "cross_attn":
        return 0
    from javis.work import prior_axes

    c, macs = config.hidden_size, 0
    for frames, places in ((grid.video_frames, grid.video_places), (grid.audio_frames, grid.audio_places)):
        keys = batch * (frames * config.spatial_prior_len + places * config.temporal_prior_len)
        unique = config.spatial_prior_len + config.temporal_prior_len
        queries = batch * frames * places
        macs += 2 * c * queries * (keys - unique) + 2 * c * c * keys
        for m, folded in prior_axes(config):
            macs += queries * (2 * c * c + 2 * c * m - 2 * c * config.num_heads * m) if folded else 0
    return 2 * config.depth * (macs + 4 * batch * config.caption_length * 2 * c * c)


def count_parameters(config: JavisDiTConfig) -> int:
    """Parameters of the model; the null captions of both branches are tied, as officially, and count once."""
    c, hidden, inner = config.hidden_size, config.mlp_size, config.bidirectional_size
    tokens = config.spatial_prior_len + config.temporal_prior_len

    def linear(size_in: int, size_out: int) -> int:
        return size_in * size_out + size_out

    mlp = linear(c, hidden) + linear(hidden, c)
    cross = linear(c, c) + linear(c, 2 * c) + linear(c, c)  # q, kv, proj
    norms = 2 * config.head_size if config.qk_norm else 0
    layer = 4 * (6 * c + linear(c, 3 * c) + linear(c, c) + norms + cross + mlp)
    total = linear(c, 6 * c) + 2 * (linear(256, c) + linear(c, c))  # timestep and frames per second
    total += config.caption_length * config.caption_channels + 2 * (linear(config.caption_channels, c) + linear(c, c))
    if config.use_prior:
        step = {"cross_attn": cross, "addition": linear(c, c), "modulate": linear(c, 2 * c)}[config.prior_mode]
        layer += 2 * (9 * c + 2 * step + mlp)
        total += linear(c, 9 * c) + tokens * config.prior_channels + linear(config.prior_channels, c) + linear(c, c)
    if config.use_bidirectional:
        layer += 2 * c + 4 * linear(c, inner) + 2 * linear(inner, c)
    for patch, channels_in, channels_out in (
        (math.prod(config.video_patch), config.video_channels, config.video_out_channels),
        (math.prod(config.audio_patch), config.audio_channels, config.audio_out_channels),
    ):
        total += linear(patch * channels_in, c) + 2 * c + linear(c, patch * channels_out)
    return total + config.depth * layer


def plan(args: PlanArgs) -> dict[str, Any]:
    """Everything ``javis plan`` prints, as json values; keys name their units.

    Raises:
        UsageError: unusable sizes, a checkpoint that is not there, a clip that does not fit ``gpu_memory``, or the
            packages of ``javis[full]`` are missing.
    """
    from javis.plan_stages import predict

    facts = counts(args)
    return facts | predict(args, facts["clip"])


def counts(args: PlanArgs) -> dict[str, Any]:
    """The part of the plan that is counted by formula: tokens, parameters, FLOPs of the denoising and their time.

    Raises:
        UsageError: unusable sizes, or a checkpoint that is not there.
    """
    from javis.work import floor_seconds, step_work, total

    _check(args)
    if args.model == "official":
        config, grid, clip = _official(args)
    elif is_full_size(args.model):
        config, grid, clip = _official(args, _transformer_config(Path(args.model)))
    else:
        config, grid, clip = _checkpoint(args)
    batch = 2 if args.guidance else 1
    flops = step_flops(config, grid, batch=batch)
    step, once = sum(flops.values()), condition_flops(config, grid, batch=batch)
    clip_flops = once + args.steps * step
    work = step_work(config, grid, batch=batch)
    tflops, gbps = args.sustained_tflops or TFLOPS, args.copy_gbps or GBPS
    floor = args.steps * floor_seconds(work, tflops * 1e12, gbps * 1e9)
    return {
        "model": args.model,
        "clip": clip,
        "tokens": {**asdict(grid), "video": grid.video, "audio": grid.audio, "text": config.caption_length},
        "parameters": count_parameters(config),
        "steps": args.steps,
        "guidance": args.guidance,
        "tflop_per_step": {name: value / 1e12 for name, value in flops.items()} | {"total": step / 1e12},
        "official_tflop_per_step": (step + official_extra_flops(config, grid, batch=batch)) / 1e12,
        "condition_tflop": once / 1e12,
        "gb_per_step_bf16": total(work)[1] / 1e9,
        "clip_tflop": clip_flops / 1e12,
        "sustained_tflops": tflops,
        "denoise_seconds": clip_flops / 1e12 / tflops,
        "copy_gbps": gbps,
        "roofline_seconds": floor,
    }


def _check(args: PlanArgs) -> None:
    if not 1 <= args.steps <= 1000:
        raise UsageError(f"steps must be a whole number from 1 to 1000, got {args.steps}")
    for name, value, high in (
        ("seconds", args.seconds, 3600),
        ("fps", args.fps, 240),
        ("tflops", TFLOPS if args.sustained_tflops is None else args.sustained_tflops, 1e9),
        ("fp8_tflops", args.fp8_tflops, 1e9),
        ("copy_gbps", GBPS if args.copy_gbps is None else args.copy_gbps, 1e9),
        ("mux_megapixels", args.mux_megapixels, 1e9),
        ("gpu_memory", 1.0 if args.gpu_memory is None else args.gpu_memory, 1e6),
    ):
        if not 0 < value <= high:  # refuses NaN, too
            raise UsageError(f"{name} must be above 0 and at most {high:g}, got {value}")


def _transformer_config(folder: Path) -> JavisDiTConfig:
    path = folder / "transformer" / "config.json"
    try:
        return JavisDiTConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"model {str(folder)!r}: {path} is not usable ({error}); convert it again") from None


def _official(args: PlanArgs, config: JavisDiTConfig | None = None) -> tuple[JavisDiTConfig, Grid, dict[str, Any]]:
    height, width = pixels(args.resolution, args.ratio)
    frames = math.ceil(round(args.seconds * args.fps, 6) / VAE_CHUNK) * VAE_CHUNK
    config = config or JavisDiTConfig()
    clip = {"height": height, "width": width, "frames": frames, "fps": args.fps, "seconds": frames / args.fps}
    return config, official_grid(config, frames, height, width, args.fps), clip


def pixels(resolution: str, ratio: str) -> tuple[int, int]:
    """(height, width) of an official size or of WIDTHxHEIGHT.

    Raises:
        UsageError: no such size.
    """
    from javis.data.sizes import SIZES, image_size

    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", resolution.strip(), re.ASCII)
    if match is None:
        named = SIZES.get(resolution)
        if named is not None and ratio == PlanArgs.ratio and "0.56" not in named:
            ratio = "1:1"  # the square families have no 9:16
        return image_size(resolution, ratio)
    width, height = int(match[1]), int(match[2])
    if not (16 <= width <= 16384 and 16 <= height <= 16384):
        raise UsageError(f"resolution {resolution!r} is unusable; expected WIDTHxHEIGHT, each from 16 to 16384")
    return height, width


def _checkpoint(args: PlanArgs) -> tuple[JavisDiTConfig, Grid, dict[str, Any]]:
    from javis.model.codecs import build_codecs

    folder = Path(javis.__file__).parent / "weights" / "demo" if args.model == "demo" else Path(args.model)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, (video, audio), clip = (
            JavisDiTConfig.from_dict(facts["model"]),
            build_codecs(facts["codecs"]),
            facts["clip"],
        )
        size, fps, rate = int(clip["size"]), float(clip["fps"]), int(clip["sample_rate"])
    except OSError as error:
        raise UsageError(
            f"model {args.model!r}: {folder.name}/config.json cannot be read ({error.strerror}); expected 'official', "
            "'demo' or a checkpoint folder"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"model {args.model!r}: config.json is not usable ({error}); export it again") from None
    frames = max(1, round(args.seconds * fps))
    grid = token_grid(config, video.latent_sizes(frames, size, size), audio.latent_sizes(round(frames * rate / fps)))
    return config, grid, {"height": size, "width": size, "frames": frames, "fps": fps, "seconds": frames / fps}


def main(args: PlanArgs) -> None:
    """Entry of ``javis plan``."""
    from javis.plan_stages import table

    facts = plan(args)
    if args.json:
        output().print(json.dumps(facts, indent=1))
        return
    clip, tokens, flops = facts["clip"], facts["tokens"], facts["tflop_per_step"]
    lines = [
        f"{facts['model']} model, {facts['parameters'] / 1e6:,.1f} M parameters",
        f"clip       {clip['width']}x{clip['height']}, {clip['frames']} frames at {clip['fps']:g} fps, "
        f"{clip['seconds']:g} s",
        f"tokens     video {tokens['video_frames']} x {tokens['video_places']} = {tokens['video']}, "
        f"audio {tokens['audio_frames']} x {tokens['audio_places']} = {tokens['audio']}, text {tokens['text']}",
        f"per step   {flops['total']:.4g} TFLOP" + (" (with guidance)" if facts["guidance"] else ""),
        *(f"             {name:24s}{value:.4g}" for name, value in flops.items() if name != "total"),
        f"official   {facts['official_tflop_per_step']:.4g} TFLOP per step, as the official code repeats the priors",
        f"per clip   {facts['clip_tflop']:.4g} TFLOP of denoising in {facts['steps']} steps",
        *table(facts),
    ]
    for line in lines:
        output().print(line)
