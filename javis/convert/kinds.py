"""The layouts that are known, and how to tell them by the names of their tensors."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from javis.convert.dit import plan_dit
from javis.convert.plan import Plan
from javis.convert.prior import plan_prior
from javis.convert.read import WeightSource
from javis.errors import UsageError


def _any(names: Iterable[str], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in names)


@dataclass(frozen=True)
class Kind:
    """A layout: what it is, whether names are of it, and the plan of its conversion."""

    what: str
    marks: Callable[[set[str]], bool]
    plan: Callable[[WeightSource, str], Plan]


def _later(module: str, function: str) -> Callable[[WeightSource, str], Plan]:
    """A plan whose module loads when it is asked for."""

    def plan(source: WeightSource, kind: str) -> Plan:
        return getattr(importlib.import_module(f"javis.convert.{module}"), function)(source, kind)

    return plan


def _is_jav(names: set[str]) -> bool:
    return _any(names, "audio_spatial_blocks.") and _any(names, "spatial_blocks.")


KINDS: dict[str, Kind] = {
    "jav": Kind("JavisDiT-v0.1-jav, both branches (spatial_blocks.*, audio_spatial_blocks.*)", _is_jav, plan_dit),
    "jav-240p4s": Kind("the same, trained for 4 s at 240p (told by its folder's name)", _is_jav, plan_dit),
    "audio": Kind(
        "JavisDiT-v0.1-audio, the audio branch (audio_spatial_blocks.* without spatial_blocks.*)",
        lambda names: _any(names, "audio_spatial_blocks.") and not _any(names, "spatial_blocks."),
        plan_dit,
    ),
    "stdit3": Kind(
        "OpenSora-STDiT-v3, the video branch (spatial_blocks.* without audio_spatial_blocks.*)",
        lambda names: _any(names, "spatial_blocks.") and not _any(names, "audio_spatial_blocks.", "ax_embedder."),
        plan_dit,
    ),
    "prior": Kind("JavisDiT-v0.1-prior (spatial_query_emb)", lambda names: "spatial_query_emb" in names, plan_prior),
    "video-vae": Kind(
        "OpenSora-VAE-v1.2 (spatial_vae.module.*, temporal_vae.*)",
        lambda names: _any(names, "spatial_vae.", "temporal_vae."),
        _later("vae", "plan_vae"),
    ),
    "imagebind": Kind(
        "ImageBind, of which the text tower is taken (modality_trunks.text.*)",
        lambda names: _any(names, "modality_trunks.text."),
        _later("imagebind", "plan_imagebind"),
    ),
    "t5": Kind(
        "T5 v1.1 XXL of transformers (encoder.block.*.SelfAttention.*)",
        lambda names: "encoder.block.0.layer.0.SelfAttention.q.weight" in names,
        _later("library", "plan_t5"),
    ),
    "audio-vae": Kind(
        "vae/ of AudioLDM2, an AutoencoderKL of diffusers (encoder.down_blocks.*, decoder.up_blocks.*)",
        lambda names: _any(names, "encoder.down_blocks.") and _any(names, "decoder.up_blocks."),
        _later("library", "plan_audio_vae"),
    ),
    "vocoder": Kind(
        "vocoder/ of AudioLDM2, a SpeechT5HifiGan of transformers (conv_pre.*, upsampler.*)",
        lambda names: "conv_pre.weight" in names and _any(names, "upsampler."),
        _later("library", "plan_vocoder"),
    ),
}


def detect(source: WeightSource, path: str) -> str:
    """The kind of a checkpoint by the names of its tensors.

    Raises:
        UsageError: no kind fits, or several do.
    """
    names = set(source.names())
    found = [kind for kind, known in KINDS.items() if known.marks(names)]
    if "jav" in found:
        found.remove("jav" if "240p4s" in path else "jav-240p4s")
    if len(found) == 1:
        return found[0]
    groups = Counter(".".join(name.split(".")[:1]) for name in sorted(names))
    there = ", ".join(f"{group} ({count})" for group, count in groups.most_common(8))
    known = "; ".join(f"{kind}: {value.what}" for kind, value in KINDS.items())
    if found:
        raise UsageError(f"{path} looks like {' and '.join(found)} at once; choose one with --kind. It holds {there}")
    if _any(names, "embed.video.", "layers.0.video_spatial."):
        raise UsageError(f"{path} has the names of javis already; there is nothing to convert")
    raise UsageError(f"{path} is of no known kind: it holds {there}. Known are {known}")


def check_kind(source: WeightSource, kind: str, path: str) -> None:
    """Raise UsageError if the names are not of the kind that was asked for."""
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}; expected auto or one of {', '.join(KINDS)}")
    names = set(source.names())
    if not KINDS[kind].marks(names):
        others = [other for other, known in KINDS.items() if known.marks(names)]
        hint = f"it looks like {' or '.join(others)}" if others else f"it holds {', '.join(sorted(names)[:4])}"
        raise UsageError(f"{path} is not {kind}, which is {KINDS[kind].what}; {hint}")
