"""The text tower of ImageBind (``imagebind_huge.pth``, or inside a prior checkpoint) -> ``prior_text_encoder/``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from javis.convert.plan import Component, Plan, need, shapes_of, strip_prefix
from javis.convert.read import WeightSource
from javis.errors import UsageError
from javis.model.encoders.imagebind import ImageBindTextConfig, ImageBindTextEncoder, imagebind_text_keys
from javis.model.encoders.tokens import write_clip_tokenizer

WHAT = "ImageBind's text tower"
OFFICIAL_HEAD_SIZE = 64
VOCABULARIES = (
    "bpe_simple_vocab_16e6.txt.gz",
    "bpe_simple_vocab_16e6.txt",
    "vocab.json",
    "tokenizer.json",
    "hash_tokenizer.json",
)
# What follows the choice of the end token, or from the sizes: the prior takes the states of all tokens before that.
_TEXT_REST = ("modality_heads.text.", "modality_postprocessors.text.", "modality_preprocessors.text.mask")


def plan_imagebind(source: WeightSource, kind: str = "imagebind") -> Plan:
    """Plan of an ImageBind checkpoint: the text tower; the other modalities are left out.

    Raises:
        UsageError: the tensors that tell the sizes are missing.
    """
    plan = Plan(kind, [])
    add_text_tower(plan, source, "")
    return plan


def add_text_tower(plan: Plan, source: WeightSource, prefix: str) -> None:
    """Add the component whose names begin with ``prefix``, and what of it is left out."""
    full = strip_prefix(source.names(), prefix)
    names = list(full)
    sources = {ours: full[name] for name, ours in imagebind_text_keys(names).items()}
    embedding, position = (f"{prefix}modality_preprocessors.text.{n}" for n in ("token_embedding.weight", "pos_embed"))
    vocabulary, width = need(source, embedding, WHAT)
    context = need(source, position, WHAT)[-2]
    hidden = need(source, f"{prefix}modality_trunks.text.blocks.0.mlp.fc1.weight", WHAT)[0]
    layers = {name.split(".")[1] for name in sources if name.startswith("blocks.")}
    assumed: dict[str, Any] = {"heads": max(1, width // OFFICIAL_HEAD_SIZE)}
    if told := (source.config or {}).get("text_num_heads"):  # the name in ImageBind's constructor
        assumed, heads = {}, int(told)
    else:
        heads = assumed["heads"]
    try:
        config = ImageBindTextConfig(
            vocab_size=vocabulary,
            width=width,
            layers=len(layers),
            heads=heads,
            context_length=context,
            mlp_ratio=hidden // width,
        )
    except ValueError as error:
        raise UsageError(f"the weights give no usable configuration: {error}") from error
    component = Component(
        "prior_text_encoder",
        "ImageBindTextEncoder",
        config.to_dict(),
        shapes_of(lambda: ImageBindTextEncoder(config)),
        sources,
        stem="model",
        assumed=assumed,
    )
    component.reshaped["position_embedding"] = (context, width)
    if vocabulary_file := find_vocabulary(source.folder):
        component.finish = lambda folder: write_vocabulary(vocabulary_file, folder)
    else:
        plan.notes.append(
            "no vocabulary beside the weights: put CLIP's vocab.json and merges.txt into prior_text_encoder/, or "
            "bpe_simple_vocab_16e6.txt.gz beside the source and convert again"
        )
    plan.components.append(component)
    for name, where in full.items():
        if name.startswith(_TEXT_REST):
            plan.ignored[where] = "not used for the prior: the states of all tokens are"
        elif name.startswith("modality_") and ".text." not in name:
            plan.ignored[where] = f"the modality {name.split('.')[1]}"


def find_vocabulary(folder: Path) -> Path | None:
    """A file with CLIP's vocabulary in ``folder``, or in ``bpe/`` below it as in ImageBind's repository."""
    places = [place / name for place in (folder, folder / "bpe") for name in VOCABULARIES]
    return next((place for place in places if place.is_file()), None)


def write_vocabulary(file: Path, folder: Path) -> None:
    """Put the tokenizer of ``file`` into ``folder``, as ``transformers`` reads it."""
    if file.suffix == ".json":
        for name in (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
    else:
        write_clip_tokenizer(file, folder)
