"""The stages of a clip, and where components wait for theirs: names alone, without torch, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Policy = Literal["all", "staged", "offload"]

# Stages of a clip in order, and the components of JavisPipeline that each needs.
STAGES: Mapping[str, tuple[str, ...]] = {
    "text": ("text_encoder",),
    "prior": ("prior_text_encoder", "prior"),
    "condition": ("model",),
    "denoise": ("model",),
    "video_decode": ("video_codec",),
    "audio_decode": ("audio_codec",),
    "mux": (),
}
