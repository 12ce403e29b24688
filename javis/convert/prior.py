"""JavisDiT-v0.1-prior (STPriorExtractor, with or without ImageBind's text tower) -> ``prior/``."""

from __future__ import annotations

import re
from typing import Any

from javis.convert.plan import Component, Plan, need, settle, shapes_of
from javis.convert.read import WeightSource
from javis.errors import UsageError
from javis.model.prior import PriorConfig, PriorEstimator

WHAT = "a prior estimator"
TEXT_TOWER = "text_encoder."  # the official prior keeps its text encoder as a submodule
# Defaults of the official configuration that no shape tells.
OFFICIAL_HEADS = 4


def plan_prior(source: WeightSource, kind: str = "prior") -> Plan:
    """Plan of a prior checkpoint.

    Raises:
        UsageError: the tensors that tell the sizes are missing or make no sense.
    """
    names = source.names()
    config, assumed, conflicts = _config(source, names)
    plan = Plan(kind, [])
    plan.ignored = {n: "a copy of the transformer's embedder" for n in names if n.startswith("st_prior_embedder.")}
    plan.ignored |= {n: "follows from the sizes" for n in names if n.endswith("inv_freq")}
    if any(n.startswith(TEXT_TOWER) for n in names):
        from javis.convert.imagebind import add_text_tower

        add_text_tower(plan, source, TEXT_TOWER)
    plan.components.insert(
        0,
        Component(
            "prior",
            "PriorEstimator",
            config.to_dict(),
            shapes_of(lambda: PriorEstimator(config)),
            {n: n for n in names if n not in plan.ignored and not n.startswith(TEXT_TOWER)},
            assumed=assumed,
            conflicts=conflicts,
        ),
    )
    return plan


def _layers(names: list[str], part: str) -> int:
    found = [int(m.group(1)) for n in names if (m := re.match(rf"prior_extractor\.{part}\.layers\.(\d+)\.", n))]
    return 1 + max(found, default=-1)


def _config(source: WeightSource, names: list[str]) -> tuple[PriorConfig, dict[str, Any], list[str]]:
    there = set(names)
    width, channels = need(source, "in_proj.weight", WHAT)
    rows = need(source, "out_proj.weight", WHAT)[0]
    shapes: dict[str, Any] = {
        "text_channels": channels,
        "hidden_size": width,
        "spatial_token_num": need(source, "spatial_query_emb", WHAT)[1],
        "temporal_token_num": need(source, "temporal_query_emb", WHAT)[1],
        "num_encoder_layers": _layers(names, "encoder"),
        "num_decoder_layers": _layers(names, "decoder"),
        "ffn_size": need(source, "prior_extractor.decoder.layers.0.linear1.weight", WHAT)[0],
        "pred_onset": "onset_predictor.weight" in there,
        "encode_va": "discriminator.cls_token" in there,
    }
    official = None if source.config is None else PriorConfig.official_fields(source.config)
    defaults: dict[str, Any] = {"num_heads": OFFICIAL_HEADS}
    if shapes["encode_va"]:
        shapes |= _embedder(source, there)
    elif shapes["pred_onset"]:
        shapes["out_dim"] = source.info("onset_predictor.weight").shape[1]
    if "out_dim" in shapes:
        shapes["apply_sampling"] = rows == 2 * shapes["out_dim"]
    else:
        sampling = (official or {}).get("apply_sampling", True)
        if official is None or "apply_sampling" not in official:
            defaults["apply_sampling"] = True
        shapes["out_dim"] = rows // 2 if sampling else rows
    values, assumed, conflicts = settle(shapes, official, defaults)
    try:
        return PriorConfig(**values), assumed, conflicts
    except (ValueError, TypeError) as error:
        raise UsageError(f"the weights and config.json give no usable configuration: {error}") from error


def _embedder(source: WeightSource, there: set[str]) -> dict[str, Any]:
    """Sizes of the audio-video embedding network, which is used in training only."""
    out, video_channels, *video_patch = need(source, "video_embedder.proj.weight", WHAT)
    _, audio_channels, *audio_patch = need(source, "audio_embedder.weight", WHAT)
    sizes: dict[str, Any] = {
        "out_dim": out,
        "video_channels": video_channels,
        "video_patch": tuple(video_patch),
        "audio_channels": audio_channels,
        "audio_patch": tuple(audio_patch),
        "qk_norm": "discriminator.attn.q_norm.weight" in there,
    }
    if sizes["qk_norm"]:
        sizes["va_num_heads"] = out // source.info("discriminator.attn.q_norm.weight").shape[0]
    return sizes
