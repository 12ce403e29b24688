"""``javis data encode``: its arguments, and what it prints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import tyro

from javis.console import output, progress_bar


@dataclass(frozen=True, kw_only=True)
class EncodeArgs:
    """Store latents, captions and hidden states of clips for training. Goes on where it stopped."""

    manifest: tyro.conf.Positional[str]
    """CSV file with the official columns, or the folder or URL of what 'javis data shard' wrote."""
    out: tyro.conf.Positional[str]
    """Folder or fsspec URL."""
    checkpoint: str = "demo"
    """Whose codecs and text encoders: a folder, a hub id, or the built-in "demo"."""
    num_frames: int | None = None
    """Frames of a clip; the checkpoint's own length by default."""
    resolution: str | None = None
    """An official size such as 240p, or WIDTHxHEIGHT; the checkpoint's own by default."""
    ratio: str | None = None
    """Height:width of an official size."""
    fps: float | None = None
    """Frames per second that are taken; the checkpoint's own by default."""
    buckets: str | None = None
    """Sizes and lengths by clip: RESOLUTION:FRAMES:PROBABILITY:BATCH,... or a json file (docs/data.md)."""
    random_start: bool = False
    """Excerpts of longer files begin anywhere; at the beginning otherwise."""
    sample: bool = False
    """Store samples of the codecs' posteriors; means otherwise."""
    seed: int = 0
    """Of buckets, starts and samples."""
    batch: int = 4
    """Clips encoded together."""
    shard_clips: int = 64
    """Clips in a file."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of what is stored."""
    share: int = 0
    """This process makes the shards share, share + shares, ..."""
    shares: int = 1
    """Processes or machines that share the work on one place."""
    device: str | None = None
    """Where the encoders run."""
    processes: int | None = None
    """Decoding processes; one per core by default."""
    timeout: float = 120.0
    """Seconds for decoding one clip."""
    json: bool = False
    """Print what was done as JSON."""


def main(args: EncodeArgs) -> None:
    """Run the command."""
    from javis.data.buckets import BucketPlan
    from javis.data.encode import EncodePlan, encode_manifest
    from javis.data.encoders import load_encoders
    from javis.data.shards import open_clips
    from javis.generation import clip_size

    manifest = open_clips(args.manifest)
    encoders = load_encoders(args.checkpoint, device=args.device)
    clip = encoders.clip
    fps = float(clip["fps"] if args.fps is None else args.fps)
    size = clip_size(clip, args.resolution, args.ratio, multiple=int(getattr(encoders.video_codec, "space_factor", 1)))
    plan = EncodePlan(
        num_frames=args.num_frames or max(1, round(clip["seconds"] * fps)),
        height=size.height,
        width=size.width,
        fps=fps,
        sample_rate=int(clip["sample_rate"]),
        buckets=None if args.buckets is None else BucketPlan.parse(args.buckets),
        random_start=args.random_start,
        sample=args.sample,
        seed=args.seed,
        batch=args.batch,
        shard_clips=args.shard_clips,
        dtype=args.dtype,
    )
    with progress_bar("encoding clips", len(manifest)) as advance:
        done = encode_manifest(
            manifest,
            args.out,
            encoders,
            plan,
            share=args.share,
            shares=args.shares,
            processes=args.processes,
            timeout=args.timeout,
            progress=lambda number, _: advance(number),
        )
    if args.json:
        output().print(json.dumps(done._asdict() | {"skipped": [clip._asdict() for clip in done.skipped]}, indent=1))
        return
    for name in done.damaged:
        output().print(f"{name}.safetensors was damaged and is encoded again")
    output().print(
        f"{args.out}: {done.clips} clips in {done.shards} shards, {done.written} written, {done.there_already} were "
        f"there already; {len(done.skipped)} clips skipped, {done.without_bucket} fit no bucket"
        + ("" if done.is_finished else "; other shares are not finished")
    )
    for skipped in done.skipped[:10]:
        output().print(f"  skipped {skipped.id} ({skipped.path}): {skipped.reason}")
    if len(done.skipped) > 10:
        output().print(f"  and {len(done.skipped) - 10} more (--json lists them)")
