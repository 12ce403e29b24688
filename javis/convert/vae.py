"""OpenSora VAE 1.2 (image VAE in ``spatial_vae.module.``, temporal VAE in ``temporal_vae.``) -> ``video_vae/``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from javis.component_specs import current_attention
from javis.convert.plan import Component, Plan, Shape, need, settle, shapes_of, strip_prefix
from javis.convert.read import WeightSource
from javis.errors import UsageError
from javis.model.vae_temporal import TemporalVAEConfig
from javis.model.video_vae import AutoencoderConfig, OpenSoraVideoCodec, OpenSoraVideoCodecConfig

WHAT = "an OpenSora VAE"
SPATIAL, TEMPORAL = "spatial_vae.module.", "temporal_vae."


def plan_vae(source: WeightSource, kind: str = "video-vae") -> Plan:
    """Plan of a video VAE checkpoint.

    Raises:
        UsageError: the tensors that tell the sizes are missing or make no sense, or ``diffusers`` is not installed.
    """
    names = source.names()
    config, assumed, conflicts = _config(source, names)
    expected = shapes_of(lambda: OpenSoraVideoCodec(config))
    sources = {"image." + current_attention(rest): name for rest, name in strip_prefix(names, SPATIAL).items()}
    sources |= {"temporal." + rest: name for rest, name in strip_prefix(names, TEMPORAL).items()}
    component = Component(
        "video_vae", "OpenSoraVideoCodec", config.to_dict(), expected, sources, assumed=assumed, conflicts=conflicts
    )
    component.reshaped = linear_from_convolution(source, sources, expected)
    plan = Plan(kind, [component])
    plan.ignored = {name: "kept in config.json" for name in ("scale", "shift") if name in names}
    return plan


def linear_from_convolution(
    source: WeightSource, sources: Mapping[str, str], expected: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Our names of attention weights [C, C] that are 1x1 convolutions [C, C, 1, 1] in the source."""
    found = {}
    for target, name in sources.items():
        shape = source.info(name).shape if ".attentions." in target else ()
        if shape[2:] == (1, 1) and expected.get(target) == shape[:2]:
            found[target] = shape[:2]
    return found


def _config(source: WeightSource, names: list[str]) -> tuple[OpenSoraVideoCodecConfig, dict[str, Any], list[str]]:
    official = source.config or {}
    image, assumed = image_sizes(source, SPATIAL)
    assumed = {f"image.{name}": value for name, value in assumed.items()}
    sizes = _temporal_sizes(source, names)
    given = official.get("vae_temporal")
    known = {k: v for k, v in given.items() if k in TemporalVAEConfig.__dataclass_fields__} if given else None
    defaults = {"num_groups": TemporalVAEConfig.num_groups}
    values, guessed, conflicts = settle(sizes, known, defaults)
    assumed |= {f"temporal.{name}": value for name, value in guessed.items()}
    constants: dict[str, Any] = {
        name: tuple(round(float(v), 6) for v in source.get(name).flatten().tolist())
        for name in ("shift", "scale")
        if name in names
    }
    fields: Mapping[str, Any] = OpenSoraVideoCodecConfig.__dataclass_fields__
    told: dict[str, Any] = {name: official[name] for name in ("shift", "scale", "micro_frame_size") if name in official}
    told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    for name, vector in constants.items():
        if name in told and max(abs(a - b) for a, b in zip(vector, told[name], strict=False)) < 1e-2:
            told[name] = vector  # equal but for the rounding of bfloat16
    rest, guessed, more = settle(
        constants, told, {n: fields[n].default for n in ("shift", "scale", "micro_frame_size")}
    )
    try:
        config = OpenSoraVideoCodecConfig(image=image, temporal=TemporalVAEConfig(**values), **rest)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the weights and config.json give no usable configuration: {error}") from error
    return config, assumed | guessed, conflicts + more


def image_sizes(source: WeightSource, prefix: str = "") -> tuple[AutoencoderConfig, dict[str, Any]]:
    """Configuration of a diffusers autoencoder from its shapes, and what they do not tell."""
    names = source.names()
    channels = need(source, f"{prefix}encoder.conv_in.weight", WHAT)[1]
    latents = need(source, f"{prefix}decoder.conv_in.weight", WHAT)[1]
    blocks, widths = 0, list[int]()
    while (first := f"{prefix}encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in names:
        widths.append(source.info(first).shape[0])
    while f"{prefix}encoder.down_blocks.0.resnets.{blocks}.conv1.weight" in names:
        blocks += 1
    fields: Mapping[str, Any] = AutoencoderConfig.__dataclass_fields__
    assumed = {name: fields[name].default for name in ("norm_num_groups", "scaling_factor")}
    given = (source.config or {}).get("vae_2d") or {}
    for name in assumed.keys() & given.keys():
        assumed.pop(name)
    config = AutoencoderConfig(
        in_channels=channels,
        latent_channels=latents,
        block_out_channels=tuple(widths),
        layers_per_block=blocks,
        **{name: given[name] for name in ("norm_num_groups", "scaling_factor") if name in given},
    )
    return config, assumed


def _temporal_sizes(source: WeightSource, names: list[str]) -> dict[str, Any]:
    there = set(names)
    encoder = TEMPORAL + "encoder."
    filters, channels, *_ = need(source, f"{encoder}conv_in.conv.weight", WHAT)
    blocks, widths = 0, list[int]()
    while (first := f"{encoder}block_res_blocks.{len(widths)}.0.conv1.conv.weight") in there:
        widths.append(source.info(first).shape[0])
    while f"{encoder}block_res_blocks.0.{blocks}.conv1.conv.weight" in there:
        blocks += 1
    embedded, inside, *_ = need(source, f"{TEMPORAL}quant_conv.conv.weight", WHAT)
    return {
        "in_out_channels": channels,
        "filters": filters,
        "num_res_blocks": blocks,
        "channel_multipliers": tuple(width // filters for width in widths),
        "temporal_downsample": tuple(
            f"{encoder}conv_blocks.{level}.conv.weight" in there for level in range(len(widths) - 1)
        ),
        "embed_dim": embedded // 2,
        "latent_embed_dim": inside // 2,
    }
