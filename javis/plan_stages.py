"""What ``javis plan`` says of each stage: which rates it takes, the prediction, and the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from javis.clip_stages import STAGES
from javis.media import samples_for
from javis.plan_args import GBPS, TFLOPS, PlanArgs, is_full_size
from javis.precision import read_keep
from javis.prediction import RESERVED, Choice, Predictor, refuse_what_cannot_fit, smaller_sizes
from javis.rates import Rates, from_rows, given, measure, read_rows
from javis.stages import ClipSize, Parts, checkpoint_parts, folder_parts, official_parts

OFFICIAL_SAMPLE_RATE = 16000


def predict(args: PlanArgs, about: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the plan that is about stages.

    Args:
        about: the clip as the plan has it: height, width, frames, fps.

    Raises:
        UsageError: it does not fit ``args.gpu_memory``, or the packages of ``javis[full]`` are missing.
    """
    predictor = _predictor(args.model, args.precision == "fp32")
    clip = _clip(args, about, predictor.parts)
    choice = Choice(residency=args.residency, precision=args.precision, resolution=args.resolution)
    if args.gpu_memory is not None:
        small = smaller_sizes(clip, args.ratio) if args.model == "official" or is_full_size(args.model) else ()
        sizes = {name: replace(clip, height=height, width=width) for name, (height, width) in small}
        refuse_what_cannot_fit(predictor, clip, choice, args.gpu_memory, sizes)
    rates, source = _rates(args, predictor, clip)
    room = None if args.gpu_memory is None else args.gpu_memory * 1e9 - RESERVED
    stages = predictor.stages(clip, choice, rates, args.mux_megapixels * 1e6, room)
    worst = max(stages, key=lambda name: stages[name]["peak_gb"])
    return {
        "precision": args.precision,
        "residency": args.residency,
        "stages": stages,
        "peak_gb": stages[worst]["peak_gb"],
        "peak_stage": worst,
        "host_gb": sum(predictor.component_bytes(args.precision).values()) / 1e9
        if args.residency == "offload"
        else 0.0,
        "reserved_gb": RESERVED / 1e9,
        "total_seconds": sum(facts["seconds"] for facts in stages.values()),
        "rates": source,
    }


@lru_cache(maxsize=2)
def _predictor(model: str, wide: bool) -> Predictor:
    cpu = not torch.cuda.is_available()  # in float32; bfloat16 without a GPU is a plan for one elsewhere
    dtype = torch.float32 if wide else torch.bfloat16
    if model == "official":
        return Predictor(official_parts(dtype), cpu=wide and cpu)
    if is_full_size(model):
        keep = read_keep(Path(model) / "transformer")
        return Predictor(folder_parts(Path(model), dtype), cpu=wide and cpu, keep=keep)
    return Predictor(checkpoint_parts(model), cpu=cpu)


def _clip(args: PlanArgs, about: Mapping[str, Any], parts: Parts) -> ClipSize:
    rate = getattr(parts.audio_codec, "sample_rate", None) or about.get("sample_rate", OFFICIAL_SAMPLE_RATE)
    return ClipSize(
        frames=about["frames"],
        height=about["height"],
        width=about["width"],
        fps=about["fps"],
        samples=samples_for(about["frames"], about["fps"], int(rate)),
        steps=args.steps,
        guided=args.guidance,
    )


def _rates(args: PlanArgs, predictor: Predictor, clip: ClipSize) -> tuple[dict[str, Rates], str]:
    """Rates of every stage, and where they come from: measured now, given, rows of the device, or the defaults."""
    names = [stage for stage in STAGES if stage != "mux"]
    if args.measure:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = measure({stage: predictor.traced(clip, stage).calls for stage in names}, device)
        return found, next(iter(found.values())).source
    device_name = args.device or (torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    dtype = "float32" if args.precision == "fp32" else "bfloat16"
    asked = args.sustained_tflops is not None or args.copy_gbps is not None
    rates = None if asked else from_rows(read_rows(), device_name, dtype)
    if rates is None:
        tflops, gbps = args.sustained_tflops or TFLOPS, args.copy_gbps or GBPS
        rates = given(tflops, gbps, f"{'given' if asked else 'assumed'}: {tflops:g} TFLOP/s, {gbps:g} GB/s")
    found = dict.fromkeys(names, rates)
    source = rates.source
    if args.precision.startswith("fp8"):
        # Folded priors and attention stay in bfloat16 (javis/precision.py).
        found["denoise"] = replace(rates, named=dict.fromkeys(("linear", "gelu_linear"), args.fp8_tflops * 1e12))
        source += f"; FP8 products given: {args.fp8_tflops:g} TFLOP/s"
    return found, source


def table(facts: Mapping[str, Any]) -> list[str]:
    """The stages as lines of text."""
    heads = ("TFLOP", "GB moved", "weights", "held", "activ.", "peak GB", "seconds")
    keys = ("tflop", "gb_moved", "weights_gb", "held_gb", "activations_gb", "peak_gb", "seconds")
    lines = [f"stages     {facts['precision']}, residency {facts['residency']}; rates {facts['rates']}"]
    lines.append(" " * 13 + f"{'':14}" + "".join(f"{head:>10}" for head in heads))
    for name, stage in facts["stages"].items():
        lines.append(" " * 13 + f"{name:14}" + "".join(f"{stage[key]:>10.3g}" for key in keys))
    host = f", {facts['host_gb']:.3g} GB on the host" if facts["host_gb"] else ""
    lines.append(
        f"memory     {facts['peak_gb']:.3g} GB at the worst moment ({facts['peak_stage']}){host}; a card needs "
        f"{facts['reserved_gb']:g} GB more for what runs it"
    )
    lines.append(f"time       {facts['total_seconds']:.3g} s with weights in place")
    return lines
