"""JavisDiT-v0.1 (VASTDiT3: audio, jav, jav-240p4s) and OpenSora-STDiT-v3 -> ``transformer/``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch

from javis.convert.plan import Component, Plan, need, settle, shapes_of
from javis.convert.read import WeightSource
from javis.errors import UsageError
from javis.model.checkpoint import ANALYTIC, official_names
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT

WHAT = "a JavisDiT or STDiT-v3"
NULL_TEXTS = {
    "embed.video_text.null": "y_embedder.y_embedding",
    "embed.audio_text.null": "audio_y_embedder.y_embedding",
}
OFFICIAL_HEAD_SIZE = 72


def plan_dit(source: WeightSource, kind: str) -> Plan:
    """Plan of a checkpoint with official DiT names.

    Raises:
        UsageError: the tensors that tell the sizes are missing or make no sense.
    """
    names = source.names()
    plan = Plan(kind, [], notes=[])
    config, assumed, conflicts = _config(source, names)
    if problem := _rope_problem(source, names, config.head_size):
        conflicts.append(problem)
    plan.ignored = {n: "follows from the sizes" for n in names if n.endswith(ANALYTIC)}
    ours, _ = official_names(names)
    component = Component(
        "transformer",
        "JavisDiT",
        config.to_dict(),
        shapes_of(lambda: JavisDiT(config)),
        {target: name for name, target in ours.items()},
        assumed=assumed,
        conflicts=conflicts,
    )
    component.absent = {name for name in component.expected if _absent(name, kind)}
    for (name, official), (_, other) in zip(NULL_TEXTS.items(), reversed(NULL_TEXTS.items()), strict=True):
        # The official model keeps one storage for both, so a checkpoint without duplicates has one of them.
        if official not in ours and other in ours and name not in component.absent:
            component.tied[name] = other
    if len(set(NULL_TEXTS.values()) & set(ours)) == 2:
        first, second = (source.get(name) for name in NULL_TEXTS.values())
        if first.shape == second.shape and not torch.equal(first, second):
            plan.notes.append("the null captions of video and audio differ; they are one tensor in the official model")
    plan.components.append(component)
    if kind == "jav-240p4s":
        plan.clip = {"resolution": "240p", "seconds": 4.0}
    return plan


def _absent(name: str, kind: str) -> bool:
    """Is it by design that a checkpoint of this kind does not have our tensor ``name``?"""
    if kind == "stdit3":
        return name.startswith(("embed.audio", "audio_final.")) or ".audio_" in name
    return kind == "audio" and re.search(r"\.video_(spatial|temporal)\.", name) is not None


def _depth(names: Iterable[str]) -> int:
    layers = [int(m.group(1)) for n in names if (m := re.match(r"[a-z_]*blocks\.(\d+)\.", n))]
    return 1 + max(layers, default=-1)


def _config(source: WeightSource, names: list[str]) -> tuple[JavisDiTConfig, dict[str, Any], list[str]]:
    shapes = _from_shapes(source, names)
    official = None if source.config is None else JavisDiTConfig.official_fields(source.config)
    defaults: dict[str, Any] = {"input_sq_size": JavisDiTConfig.input_sq_size}
    if "num_heads" not in shapes:
        defaults["num_heads"] = max(1, shapes["hidden_size"] // OFFICIAL_HEAD_SIZE)
    total = shapes.pop("prior_tokens", None)
    if total is not None:
        given = official or {}
        told = (given.get("spatial_prior_len"), given.get("temporal_prior_len"))
        if None in told or sum(told) != total:  # type: ignore[arg-type]
            if None not in told:
                raise UsageError(
                    f"config.json has {told[0]} spatial and {told[1]} temporal prior tokens, the weights {total} in all"
                    "; give the config.json of these weights"
                )
            official = {k: v for k, v in given.items() if not k.endswith("_prior_len")}
            defaults |= {"spatial_prior_len": total - total // 2, "temporal_prior_len": total // 2}
    if "caption_length" not in shapes:
        defaults["caption_length"] = JavisDiTConfig.caption_length
    values, assumed, conflicts = settle(shapes, official, defaults)
    try:
        return JavisDiTConfig(**values), assumed, conflicts
    except (ValueError, TypeError) as error:
        raise UsageError(f"the weights and config.json give no usable configuration: {error}") from error


def _from_shapes(source: WeightSource, names: list[str]) -> dict[str, Any]:
    """What the shapes tell, in the fields of :class:`JavisDiTConfig`; ``prior_tokens`` is the sum of both kinds."""
    there = set(names)
    width, channels, *patch = need(source, "x_embedder.proj.weight", WHAT)
    shapes: dict[str, Any] = {"hidden_size": width, "video_channels": channels, "video_patch": tuple(patch)}
    shapes["depth"] = _depth(names)
    if "ax_embedder.proj.weight" in there:
        _, shapes["audio_channels"], *audio_patch = source.info("ax_embedder.proj.weight").shape
        shapes["audio_patch"] = tuple(audio_patch)
    norms = [n for n in names if n.endswith(".attn.q_norm.weight")]
    shapes["qk_norm"] = bool(norms)
    head = source.info(norms[0]).shape[0] if norms else None
    if head is None and "rope.freqs" in there:
        head = 2 * source.info("rope.freqs").shape[0]
    if head:
        shapes["num_heads"] = width // head
    if first := next((n for n in names if n.endswith("spatial_blocks.0.mlp.fc1.weight")), None):
        shapes["mlp_ratio"] = source.info(first).shape[0] / width
    if "final_layer.linear.weight" in there:
        shapes["pred_sigma"] = source.info("final_layer.linear.weight").shape[0] == 2 * channels * math.prod(patch)
    for text in NULL_TEXTS.values():
        if text in there:
            shapes["caption_length"], shapes["caption_channels"] = source.info(text).shape
    shapes["use_prior"] = any("st_prior" in n for n in names)
    shapes["use_bidirectional"] = any(n.startswith("va_cross_blocks.") for n in names)
    if shapes["use_prior"]:
        shapes["prior_tokens"], shapes["prior_channels"] = need(source, "st_prior_embedder.y_embedding", WHAT)
        mixer = "video_st_prior_blocks.0.spatial_cross_attn."
        rows = need(source, mixer + "proj.weight", WHAT)[0]
        if mixer + "q_linear.weight" in there:
            shapes["prior_mode"] = "cross_attn"
        else:
            shapes["prior_mode"] = "modulate" if rows == 2 * width else "addition"
    return shapes


def _rope_problem(source: WeightSource, names: list[str], head_size: int) -> str | None:
    """RoPE frequencies may be learned; this model computes them, so they must be what it computes."""
    if "rope.freqs" not in names:
        return None
    found = source.get("rope.freqs").double()
    expected = 10000.0 ** -(torch.arange(0, head_size, 2).double() / head_size)
    if found.shape == expected.shape and torch.allclose(found, expected, rtol=2**-7, atol=0):  # bf16 is enough
        return None
    return f"rope.freqs are not 10000^(-2i/{head_size}) for i < {head_size // 2}, which is what this model computes"
