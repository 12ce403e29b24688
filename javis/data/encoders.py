"""The frozen parts of a checkpoint that clips and captions are encoded with: codecs and text encoders, nothing else."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from javis.errors import UsageError
from javis.model.codecs import AudioCodec, VideoCodec
from javis.model.text import TextEncoder


@dataclass(frozen=True)
class Encoders:
    """What makes latents and hidden states.

    Attributes:
        prior_text_encoder: whose hidden states the priors are estimated from; None: those of ``text_encoder``.
        clip: defaults of the checkpoint's clips ("fps", "seconds", "sample_rate", "size" or "resolution").
        identity: digest of weights and configurations; latents of another identity are others.
        is_small: captions are in the words of the small world.
    """

    video_codec: VideoCodec
    audio_codec: AudioCodec
    text_encoder: TextEncoder
    prior_text_encoder: TextEncoder | None
    clip: dict[str, Any]
    identity: str
    device: torch.device
    is_small: bool

    def caption(self, text: str) -> str:
        """A text as the encoders want it: cleaned as officially (no score is added), or a normalised world caption.

        Raises:
            UsageError: empty or overlong, or words that the small world does not know.
        """
        if not self.is_small:
            from javis.generation import full_captions

            return full_captions([text], negative=True)[0]
        from javis.world import normalize_prompt

        caption = normalize_prompt(text)
        try:
            self.text_encoder([caption])
        except ValueError as error:
            raise UsageError(str(error)) from None
        return caption

    @torch.no_grad()
    def video(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3] -> latents [B, C, T', H', W']; with a generator a sample where the codec has one."""
        video = frames.to(self.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return _encoded(self.video_codec, video, generator)

    @torch.no_grad()
    def audio(self, waveform: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """float32 [B, samples] -> latents [B, C, T', M]."""
        return _encoded(self.audio_codec, waveform.to(self.device), generator)

    @torch.no_grad()
    def text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> hidden states [B, L, C] and mask bool [B, L]."""
        return self.text_encoder(captions)

    @torch.no_grad()
    def prior_text(self, captions: list[str]) -> tuple[Tensor, Tensor] | None:
        """The same for the priors; None: they are those of `text`."""
        return None if self.prior_text_encoder is None else self.prior_text_encoder(captions)


def _encoded(codec: Any, value: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is not None and "generator" in inspect.signature(codec.encode).parameters:
        return codec.encode(value, generator=generator)  # type: ignore[no-any-return]
    return codec.encode(value)  # type: ignore[no-any-return]


def load_encoders(
    checkpoint: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Encoders:
    """The codecs and text encoders of a checkpoint; the transformer is not read.

    Args:
        checkpoint: a folder, a hub id, or "demo". device, dtype: as in ``JavisPipeline.from_pretrained``.

    Raises:
        UsageError: no such checkpoint, missing or corrupt files.
    """
    from javis import components

    folder = components.resolve(checkpoint)
    if folder is not None and (folder / components.INDEX).is_file():
        names = ("text_encoder", "prior_text_encoder", "video_codec", "audio_codec")
        made, description = components.load_some(folder, names, device=device, dtype=dtype)
        return Encoders(
            **made,
            clip=description["clip"],
            identity=_folder_identity(folder),
            device=components.choose_device(device),
            is_small=False,
        )
    from javis.demo_checkpoint import read_demo
    from javis.model.ops import ModelOps

    parts = read_demo(checkpoint if folder is None else str(folder), ModelOps())
    target = components.choose_device("cpu" if device is None else device)
    codecs = [codec.to(target).eval() for codec in (parts.video_codec, parts.audio_codec)]
    told = {name: parts.description[name] for name in ("codecs", "text", "clip")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for codec in codecs:
        for name, value in sorted(codec.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return Encoders(
        parts.video_codec, parts.audio_codec, parts.text_encoder, None, parts.description["clip"],
        digest.hexdigest()[:32], target, True,
    )  # fmt: skip


def _folder_identity(folder: Any) -> str:
    from javis.condition_cache import component_identity

    names = ("text_encoder", "tokenizer", "prior_text_encoder", "video_vae", "audio_vae")
    parts = [component_identity(folder / name) for name in names if (folder / name).is_dir()]
    return hashlib.sha256("-".join(parts).encode()).hexdigest()[:32]
