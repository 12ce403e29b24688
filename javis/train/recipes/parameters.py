"""What each stage trains, and from which weights the audio branch starts.

The official rules (JavisDiT, public configurations of its stages 1 and 3): with the video branch frozen, the embedders
of timestep and frame rate and their modulation, which both branches share, stay as they are. Stage 1 then trains the
audio branch with its caption embedder; stage 3 only what joins the branches: prior embedder, prior modulation, prior
blocks, bidirectional attention. The null caption and the null prior of classifier-free guidance are never trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from javis.model.dit import JavisDiT

Part = Literal["shared", "video", "audio", "video_text", "audio_text", "prior", "bidirectional", "null"]
Stage = Literal["audio", "joint"]
Train = Literal["official", "all"]

# Of the names between dots, the first that is here tells the part.
_PARTS: dict[str, Part] = {
    "null": "null",
    "video_text": "video_text",
    "audio_text": "audio_text",
    "video_prior": "prior",
    "audio_prior": "prior",
    "prior_time_block": "prior",
    "bidirectional": "bidirectional",
    "video_spatial": "video",
    "video_temporal": "video",
    "video_final": "video",
    "audio_spatial": "audio",
    "audio_temporal": "audio",
    "audio_final": "audio",
    "time_block": "shared",
}
_EMBEDDERS: dict[str, Part] = {"video": "video", "audio": "audio", "time": "shared", "fps": "shared", "prior": "prior"}

TRAINED: dict[tuple[Stage, Train], frozenset[Part]] = {
    ("audio", "official"): frozenset({"audio", "audio_text"}),
    ("audio", "all"): frozenset({"shared", "audio", "audio_text"}),  # the video branch takes no part in this stage
    ("joint", "official"): frozenset({"prior", "bidirectional"}),
    ("joint", "all"): frozenset({"shared", "video", "audio", "video_text", "audio_text", "prior", "bidirectional"}),
}


def part_of(name: str) -> Part:
    """The part that a parameter of :class:`JavisDiT` belongs to.

    Raises:
        KeyError: no parameter of such a model has this name.
    """
    words = name.split(".")
    if words[-1] == "null":
        return "null"
    if words[0] == "embed" and words[1] in _EMBEDDERS:
        return _EMBEDDERS[words[1]]
    for word in words:
        if word in _PARTS:
            return _PARTS[word]
    raise KeyError(f"parameter {name!r} belongs to no part of the model that a stage trains or freezes")


def freeze(model: JavisDiT, stage: Stage, train: Train = "official") -> list[str]:
    """Set ``requires_grad`` of every parameter by the rules of a stage; returns the names of the trained ones.

    ``train="all"`` trains whatever takes part in the stage (a model that has no pretrained video branch).
    """
    trained = TRAINED[stage, train]
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)
        if parameter.requires_grad:
            names.append(name)
    return names


# Video parameter -> audio parameter that starts from it, as prefixes.
_TWINS = (("video_spatial.", "audio_spatial."), ("video_temporal.", "audio_temporal."))
_TOP_TWINS = (
    ("embed.video_text.", "embed.audio_text."),
    ("embed.video.", "embed.audio."),
    ("video_final.", "audio_final."),
)


def audio_twin(name: str) -> str | None:
    """The audio parameter that starts from a video parameter, or None."""
    for video, audio in _TOP_TWINS:
        if name.startswith(video):
            return audio + name[len(video) :]
    for video, audio in _TWINS:
        head, found, rest = name.partition(f".{video}")
        if found and head.startswith("layers."):
            return f"{head}.{audio}{rest}"
    return None


@torch.no_grad()
def audio_from_video(model: JavisDiT) -> list[str]:
    """Start the audio branch from the video branch's weights, wherever the shapes agree (section 4.1 of the paper).

    The blocks and the caption embedder agree always; patch embedder and final layer only if latents and patches do.

    Returns:
        Names of the parameters that were set.
    """
    state = dict(model.named_parameters())
    copied = []
    for name, value in state.items():
        twin = audio_twin(name)
        if twin is not None and twin in state and state[twin].shape == value.shape:
            state[twin].copy_(value)
            copied.append(twin)
    return copied


def count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """(all, trained) numbers of values; shared parameters count once."""
    unique = {id(p): p for p in parameters}.values()
    return sum(p.numel() for p in unique), sum(p.numel() for p in unique if p.requires_grad)
