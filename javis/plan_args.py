"""What ``javis plan`` is asked. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from javis.clip_stages import Policy

Precision = Literal["bf16", "fp32", "fp8", "fp8-te"]
TFLOPS, GBPS = 500.0, 3000.0  # where nothing is given or measured


@dataclass(frozen=True, kw_only=True)
class PlanArgs:
    """Say how many tokens, FLOPs, bytes and seconds a clip takes, without making it or loading anything."""

    model: str = "official"
    """"official" (JavisDiT-v0.1), "demo" (the built-in model), or a checkpoint folder."""
    resolution: str = "720p"
    """Official size name (144p ... 4k) or WIDTHxHEIGHT. The built-in model has one size and ignores it."""
    ratio: str = "9:16"
    """Height:width of a named size."""
    seconds: float = 2.0
    """Length of the clip; at official size rounded up to whole chunks of 17 frames."""
    fps: float = 24.0
    """Frames per second at official size."""
    steps: int = 30
    """Denoising steps."""
    guidance: bool = True
    """Classifier-free guidance, which doubles the work."""
    precision: Precision = "bf16"
    """Of the weights and products of the model; the sound codec always has float32."""
    residency: Policy = "all"
    """Components on the device: all, or only those of the running stage, the others on disk (staged) or on the host
    (offload)."""
    gpu_memory: float | None = None
    """GB of the card: a clip that does not fit is refused, with what would fit."""
    device: str | None = None
    """Rates from measured rows of a device whose name contains this; by default the GPU of this machine."""
    sustained_tflops: float | None = None
    """TFLOP/s of products, where no rows are taken (500)."""
    fp8_tflops: float = 1000.0
    """TFLOP/s of FP8 products."""
    copy_gbps: float | None = None
    """GB/s, read and written, of memory, where no rows are taken (3000)."""
    mux_megapixels: float = 100.0
    """Million pixels per second that are encoded into the file, where no rows are taken."""
    measure: bool = False
    """Measure the rates on this machine, in some seconds, and use those."""
    json: bool = False
    """Print the same as JSON."""


def is_full_size(model: str) -> bool:
    """Whether ``model`` is the folder of a full-size checkpoint."""
    return (Path(model) / "model_index.json").is_file()
