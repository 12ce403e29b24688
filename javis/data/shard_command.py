"""``javis data shard``: its arguments, and what it prints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from javis.console import output, progress_bar
from javis.data.manifest import Manifest
from javis.data.shards import SHARD_BYTES, SHARD_CLIPS, write_shards


@dataclass(frozen=True, kw_only=True)
class ShardArgs:
    """Write the clips of a manifest into tar files in the layout of webdataset. Goes on where it stopped."""

    manifest: tyro.conf.Positional[Path]
    """CSV file with the official columns."""
    out: tyro.conf.Positional[str]
    """Folder, or a URL that fsspec knows (s3://..., gs://...; the package for it must be installed)."""
    shard_bytes: int = SHARD_BYTES
    """A shard ends before the clip that would make it larger."""
    shard_clips: int = SHARD_CLIPS
    """Most clips in a shard."""
    seed: int | None = None
    """Shuffle the clips; without it they keep their order."""
    verify: bool = False
    """Read the shards that are there already, and write damaged ones again."""
    json: bool = False
    """Print what was done as JSON."""


def main(args: ShardArgs) -> None:
    """Run the command."""
    manifest = Manifest.read(args.manifest)
    with progress_bar("writing shards", 1) as advance:
        done = write_shards(
            manifest,
            args.out,
            shard_bytes=args.shard_bytes,
            shard_clips=args.shard_clips,
            seed=args.seed,
            verify=args.verify,
            progress=lambda number, total: advance(number / total),
        )
    if args.json:
        facts = {
            "out": args.out,
            "clips": done.clips,
            "bytes": sum(shard.bytes for shard in done.shards),
            "shards": len(done.shards),
            "written": done.written,
            "skipped": done.skipped,
        }
        output().print(json.dumps(facts, indent=1))
        return
    output().print(
        f"{args.out}: {done.clips} clips in {len(done.shards)} shards, {done.written} written, {done.skipped} were "
        "there already"
    )
