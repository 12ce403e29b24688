"""``javis convert SRC DST``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from javis.console import output, progress_bar


@dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    """Convert an official checkpoint into a component folder of a javis checkpoint."""

    source: tyro.conf.Positional[Path]
    """Weights file (.safetensors; .pth, .pt and .bin if they hold tensors alone), index file, or a folder with them."""
    destination: tyro.conf.Positional[Path]
    """Folder of the checkpoint; what other conversions put there stays."""
    kind: Literal[
        "auto", "jav", "jav-240p4s", "audio", "stdit3", "prior", "video-vae", "imagebind", "t5", "audio-vae", "vocoder"
    ] = "auto"
    """What the source is; "auto" tells it by the names of the tensors."""
    strict: bool = True
    """Stop unless every tensor has its place and every place its tensor; otherwise convert what fits."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the floating point tensors; without it they keep theirs."""
    overwrite: bool = False
    """Replace components that are there already."""
    merge: bool = False
    """Complete the transformer that is there, which has one branch only, by the other branch."""
    entry: str | None = None
    """Which part of a .pth file to take, if it holds several ("ema", "model")."""
    max_shard_gb: float = 5.0
    """A larger component becomes shards of at most this many GB, and an index."""
    json: bool = False
    """Print the account of every tensor as JSON."""


def main(args: ConvertArgs) -> None:
    from rich.console import Console

    from javis.convert import convert

    with progress_bar("converting", 1) as advance:
        report = convert(
            args.source,
            args.destination,
            kind=args.kind,
            strict=args.strict,
            dtype=args.dtype,
            overwrite=args.overwrite,
            merge=args.merge,
            entry=args.entry,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            progress=advance,
        )
    if args.json:
        output().print(json.dumps(report.to_dict(), indent=1))
    else:
        report.render(Console(soft_wrap=True, highlight=False, emoji=False, markup=False))
