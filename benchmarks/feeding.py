"""Clips per second of each feeder: decoding, scaling, resampling and log-mel of clips on disk.

    python -m benchmarks.feeding                                   a table; --append adds its rows to benchmarks/results
    python -m benchmarks.feeding --device cuda --clips 512 --codecs h264 vp9
    python -m benchmarks.feeding --quick                           few small clips, to try the script

The clips are of the synthetic world, two seconds each, with a 16-bit wav. The feeders take turns in random order. In a
turn a feeder first gives the batches that it made ahead, untimed, and then the timed ones, one after the other as fast
as it can; between turns it rests. A row has the quantiles over the turns.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from javis import bench
from javis.bench import append_rows, environment
from javis.data.feed import FeedPlan
from javis.data.feed_base import OrderedFeeder
from javis.data.feeders import has_dali, make_feeder
from javis.data.manifest import ClipRow, Manifest
from javis.media import write_clip
from javis.timing import quantile
from javis.world import WorldConfig, render_audio, render_video, sample_scene
from javis.world.make import encode_vp9, encode_wav

Row = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """Size of the clips."""

    side: int  # pixels
    fps: int

    @property
    def frames(self) -> int:
        return 2 * self.fps


CLIPS = {"64": Clip(64, 16), "256": Clip(256, 24), "512": Clip(512, 24), "720": Clip(720, 24)}


def write_clips(folder: Path, clip: Clip, codec: str, count: int) -> Manifest:
    """Different clips, with their sound beside them."""
    config = WorldConfig(size=clip.side, fps=clip.fps, seconds=clip.frames / clip.fps)
    rows = []
    for number in range(count):
        scene = sample_scene(number, config)
        video, audio = folder / f"{number}.mp4", folder / f"{number}.wav"
        frames, wave = render_video(scene), render_audio(scene)
        audio.write_bytes(encode_wav(wave, config.sample_rate))
        if codec == "vp9":
            video.write_bytes(encode_vp9(frames, clip.fps))
        else:
            write_clip(video, frames, wave, clip.fps, config.sample_rate)
        side = clip.side
        rows.append(
            ClipRow(
                str(video), str(number), video.name, len(frames), side, side, 1.0, clip.fps, side * side, str(audio),
                config.sample_rate, "",
            )
        )  # fmt: skip
    return Manifest(tuple(rows))


def feeders(manifest: Manifest, plan: FeedPlan, codec: str) -> dict[str, OrderedFeeder[Any]]:
    """By name, those that can decode these clips, with their workers started."""
    names = ["pyav"]
    if not has_dali():
        print("DALI is not installed: not measured")
    elif codec == "vp9" or plan.device != "cpu":
        names.append("dali")
    else:
        print(f"DALI's CPU mode does not decode {codec}: not measured")
    made: dict[str, OrderedFeeder[Any]] = {}
    for name in names:
        feeder = make_feeder(manifest, plan, name)  # type: ignore[arg-type]
        assert isinstance(feeder, OrderedFeeder)
        following(feeder, plan.prefetch + 1)
        feeder.rest()
        made[name] = feeder
    return made


def following(feeder: OrderedFeeder[Any], batches: int) -> None:
    """Take so many batches, over the ends of epochs."""
    for _ in range(batches):
        next(iter(feeder))


def measure(manifest: Manifest, plan: FeedPlan, codec: str, args: argparse.Namespace) -> list[Row]:
    """Rows without clip and environment."""
    made = feeders(manifest, plan, codec)
    speeds: dict[str, list[float]] = {name: [] for name in made}
    order = random.Random(0)
    for _ in range(args.repeats):
        for name in order.sample(list(made), len(made)):
            feeder = made[name]
            following(feeder, plan.prefetch + 1)
            began = time.perf_counter()
            following(feeder, args.batches)
            speeds[name].append(args.batches * plan.batch / (time.perf_counter() - began))
            feeder.rest()
    for feeder in made.values():
        assert not feeder.skipped, feeder.skipped
        feeder.close()
    return [
        {"feeder": name}
        | {f"clips_per_s_p{p}": round(quantile(values, p / 100), 2) for p in (20, 50, 80)}
        | {"turns": len(values)}
        for name, values in speeds.items()
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.feeding", description="clips per second of each feeder")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--clips", nargs="+", default=["64", "256"], choices=list(CLIPS))
    made.add_argument("--codecs", nargs="+", default=["vp9"], choices=("vp9", "h264"))
    made.add_argument("--count", type=int, default=16, help="different clips")
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--batches", type=int, default=8, help="timed batches of a turn")
    made.add_argument("--repeats", type=int, default=7, help="turns of each feeder")
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--append", action="store_true", help="add the rows to the results")
    made.add_argument("--results", type=Path, help="folder for the rows instead of benchmarks/results")
    made.add_argument("--quick", action="store_true", help="few small clips; the figures say nothing")
    made.add_argument("--json", type=Path, help="write the rows there, too")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.quick:
        args.clips, args.count, args.batch, args.batches, args.repeats = ["64"], 2, 1, 2, 1
    if args.results is not None:
        bench.RESULTS = args.results
    rows: list[Row] = []
    for name in args.clips:
        for codec in args.codecs:
            clip = CLIPS[name]
            plan = FeedPlan(
                num_frames=clip.frames, height=clip.side, width=clip.side, fps=clip.fps, batch=args.batch,
                workers=args.workers, device=args.device,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                print(f"making {args.count} clips of {clip.side}x{clip.side}, {clip.frames} frames, {codec}")
                manifest = write_clips(Path(folder), clip, codec, args.count)
                found = measure(manifest, plan, codec, args)
            about = {"bench": "feeding", "clip": f"{clip.side}x{clip.side}", "frames": clip.frames, "codec": codec}
            options = {"batch": args.batch, "workers": args.workers, "decode_device": args.device}
            rows += [about | row | options | environment(args.device) for row in found]
    print(f"{'clips per second':18s}{'codec':8s}{'feeder':8s}{'p20':>9s}{'p50':>9s}{'p80':>9s}")
    for row in rows:
        speeds = "".join(f"{row[f'clips_per_s_p{p}']:9g}" for p in (20, 50, 80))
        print(f"{row['clip']:18s}{row['codec']:8s}{row['feeder']:8s}{speeds}")
    if args.append or args.results is not None:
        append_rows(rows)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
