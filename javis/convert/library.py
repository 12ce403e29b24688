"""Checkpoints that a library wrote, whose names stay: T5, the mel VAE and the vocoder of AudioLDM2.

They are converted because the originals may be pickles (``pytorch_model.bin``), which javis does not load, and because
a checkpoint folder is then complete.
"""

from __future__ import annotations

from typing import Any

import torch

from javis.component_specs import current_attention
from javis.convert.plan import Component, Plan, settle, shapes_of
from javis.convert.read import WeightSource
from javis.convert.vae import image_sizes, linear_from_convolution
from javis.errors import UsageError
from javis.model.audio_vae import VocoderConfig
from javis.model.encoders.t5 import T5EncoderConfig
from javis.model.parts import library
from javis.model.video_vae import AutoencoderConfig

TOKENIZER_FILES = (
    "hash_tokenizer.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")


def _official(source: WeightSource, what: str) -> dict[str, Any]:
    if source.config is None:
        raise UsageError(
            f"{source.folder} has no config.json, which {what} needs; copy it from where the weights are from"
        )
    return source.config


def plan_t5(source: WeightSource, kind: str = "t5") -> Plan:
    """Plan of a T5 caption encoder: the encoder half, the embedding table once, and the tokenizer."""
    values = _official(source, "T5")
    try:
        config = T5EncoderConfig.from_library(values)
    except (ValueError, TypeError) as error:
        raise UsageError(f"config.json is no configuration of a T5: {error}") from error
    transformers = library("transformers")
    expected = shapes_of(lambda: transformers.T5EncoderModel(transformers.T5Config(**config.to_library())))
    expected.pop(T5_TABLES[1], None)
    names = source.names()
    plan = Plan(kind, [])
    plan.ignored = {n: "of the decoder half" for n in names if n.startswith(("decoder.", "lm_head."))}
    component = Component("text_encoder", "T5Encoder", values, expected, {n: n for n in names}, stem="model")
    if T5_TABLES[0] not in names:
        component.sources[T5_TABLES[0]] = T5_TABLES[1]
    elif T5_TABLES[1] in names:
        plan.ignored[T5_TABLES[1]] = f"the same table as {T5_TABLES[0]}"
        if not torch.equal(source.get(T5_TABLES[0]), source.get(T5_TABLES[1])):
            component.conflicts.append(f"{' and '.join(T5_TABLES)} differ; in a T5 they are one table")
    plan.components.append(component)
    files = {name: source.folder / name for name in TOKENIZER_FILES if (source.folder / name).is_file()}
    if files:
        plan.components.append(Component("tokenizer", "T5Tokenizer", {}, {}, {}, files=files))
    else:
        plan.notes.append("no tokenizer beside the weights: put spiece.model into tokenizer/")
    return plan


def plan_audio_vae(source: WeightSource, kind: str = "audio-vae") -> Plan:
    """Plan of a diffusers ``AutoencoderKL`` on mels."""
    values = _official(source, "the mel VAE")
    sizes, _ = image_sizes(source)
    config = AutoencoderConfig.from_library(values)
    told = {n: getattr(config, n) for n in ("in_channels", "latent_channels", "block_out_channels", "layers_per_block")}
    conflicts = settle({name: getattr(sizes, name) for name in told}, told, {})[2]
    expected = shapes_of(config.build)
    sources = {current_attention(name): name for name in source.names()}
    component = Component("audio_vae", "AudioLDM2Codec", values, expected, sources, conflicts=conflicts)
    component.reshaped = linear_from_convolution(source, sources, expected)
    return Plan(kind, [component])


def plan_vocoder(source: WeightSource, kind: str = "vocoder") -> Plan:
    """Plan of a ``SpeechT5HifiGan``."""
    values = _official(source, "the vocoder")
    expected = shapes_of(VocoderConfig.from_library(values).build)
    names = {name: name for name in source.names()}
    return Plan(kind, [Component("vocoder", "SpeechT5HifiGan", values, expected, names, stem="model")])
