"""What the components of the full-size pipeline are: their classes, their folders and files, their sizes.

Heavy packages are imported by the functions of a component only when it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from javis.component_files import read_json, write_json
from javis.errors import UsageError
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.model.prior import PriorConfig, PriorEstimator

DIFFUSION, TRANSFORMERS = "diffusion_pytorch_model", "model"  # file names without suffix, as those libraries have them
# Names of the attention in autoencoders that diffusers wrote before version 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Weights:
    """Where a part of a component's weights lies: ``folder/stem.safetensors``, without ``prefix`` in its names."""

    folder: str
    stem: str
    prefix: str = ""
    rename: Callable[[str], str | None] | None = None


@dataclass(frozen=True)
class Spec:
    """One component; ``attribute`` is its name in `JavisPipeline`."""

    attribute: str
    class_name: str
    weights: tuple[Weights, ...]
    make: Callable[[Any, ModelOps], nn.Module]
    read: Callable[[Path], Any]
    write: Callable[[Any, Path], None]

    @property
    def name(self) -> str:
        """Its folder."""
        return self.weights[0].folder


def current_attention(name: str) -> str:
    """The name that today's diffusers gives a parameter of an autoencoder."""
    match = re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)", name)
    return name if match is None else f"{match[1]}{_OLD_ATTENTION[match[2]]}.{match[3]}"


def _encoder_half(name: str) -> str | None:
    """Names of a whole T5: the decoder is not needed."""
    return None if name.startswith(("decoder.", "lm_head.")) else name


def _make_t5(config: Any, ops: ModelOps) -> nn.Module:
    from javis.model.encoders.t5 import T5Encoder

    return T5Encoder(config)


def _read_t5(root: Path) -> Any:
    from javis.model.encoders.t5 import T5EncoderConfig

    values = read_json(root / "text_encoder" / "config.json")
    return T5EncoderConfig.from_library(values, **{"max_length": values.get("caption_length", 300)})


def _write_t5(encoder: Any, root: Path) -> None:
    c = encoder.config
    own = {"model_type": "t5", "architectures": ["T5EncoderModel"], "caption_length": c.max_length}
    write_json(root / "text_encoder" / "config.json", c.to_library() | own)
    encoder.tokenizer.save(root / "tokenizer")


def _make_imagebind(config: Any, ops: ModelOps) -> nn.Module:
    from javis.model.encoders.imagebind import ImageBindTextEncoder

    return ImageBindTextEncoder(config)


def _read_imagebind(root: Path) -> Any:
    from javis.model.encoders.imagebind import ImageBindTextConfig

    return ImageBindTextConfig.from_dict(read_json(root / "prior_text_encoder" / "config.json"))


def _write_imagebind(encoder: Any, root: Path) -> None:
    write_json(root / "prior_text_encoder" / "config.json", encoder.config.to_dict())
    encoder.tokenizer.save(root / "prior_text_encoder")


def _make_video(config: Any, ops: ModelOps) -> nn.Module:
    from javis.model.video_vae import OpenSoraVideoCodec

    return OpenSoraVideoCodec(config)


def _read_video(root: Path) -> Any:
    from javis.model.video_vae import OpenSoraVideoCodecConfig

    return OpenSoraVideoCodecConfig.from_dict(read_json(root / "video_vae" / "config.json"))


def _make_audio(config: Any, ops: ModelOps) -> nn.Module:
    from javis.model.audio_vae import AudioLDM2Codec

    return AudioLDM2Codec(config)


def _read_audio(root: Path) -> Any:
    from javis.model.audio_vae import AudioLDM2CodecConfig, VocoderConfig
    from javis.model.video_vae import AutoencoderConfig

    vae = AutoencoderConfig.from_library(read_json(root / "audio_vae" / "config.json"))
    return AudioLDM2CodecConfig(
        vae=vae, vocoder=VocoderConfig.from_library(read_json(root / "vocoder" / "config.json"))
    )


def _write_audio(codec: Any, root: Path) -> None:
    vae, vocoder = codec.config.vae.to_library(), codec.config.vocoder.to_dict()
    write_json(root / "audio_vae" / "config.json", {"_class_name": "AutoencoderKL"} | vae)
    named = {"model_type": "hifigan", "architectures": ["SpeechT5HifiGan"]}
    write_json(root / "vocoder" / "config.json", named | vocoder)


def _config_writer(folder: str) -> Callable[[Any, Path], None]:
    return lambda component, root: write_json(root / folder / "config.json", component.config.to_dict())


SPECS: tuple[Spec, ...] = (
    Spec("text_encoder", "T5Encoder", (Weights("text_encoder", TRANSFORMERS, "model.", _encoder_half),),
         _make_t5, _read_t5, _write_t5),
    Spec("prior_text_encoder", "ImageBindTextEncoder", (Weights("prior_text_encoder", TRANSFORMERS),),
         _make_imagebind, _read_imagebind, _write_imagebind),
    Spec("prior", "PriorEstimator", (Weights("prior", DIFFUSION),),
         lambda config, ops: PriorEstimator(config),
         lambda root: PriorConfig.from_dict(read_json(root / "prior" / "config.json")),
         _config_writer("prior")),
    Spec("model", "JavisDiT", (Weights("transformer", DIFFUSION),),
         JavisDiT,
         lambda root: JavisDiTConfig.from_dict(read_json(root / "transformer" / "config.json")),
         _config_writer("transformer")),
    Spec("video_codec", "OpenSoraVideoCodec", (Weights("video_vae", DIFFUSION, "", current_attention),),
         _make_video, _read_video, _config_writer("video_vae")),
    Spec("audio_codec", "AudioLDM2Codec", (Weights("audio_vae", DIFFUSION, "vae.", current_attention),
                                           Weights("vocoder", TRANSFORMERS, "vocoder.")),
         _make_audio, _read_audio, _write_audio),
)  # fmt: skip


# -- sizes and dtypes --------------------------------------------------------------------------------------------------


def component_dtypes(device: torch.device, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Attribute -> dtype: what is asked for, bfloat16 on a GPU if nothing is; the sound codec in float32."""
    chosen = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    # The vocoder makes audible noise in bfloat16; both its and the mel VAE's share of the time is small.
    return {spec.attribute: torch.float32 if spec.attribute == "audio_codec" else chosen for spec in SPECS}


def configurations(size: str) -> dict[str, Any]:
    """Attribute -> configuration of every component: "full", the official one, or "toy", the same with small numbers.

    Raises:
        UsageError: another size.
    """
    if size not in ("full", "toy"):
        raise UsageError(f"unknown size {size!r}; expected full or toy")
    from javis.model.audio_vae import AudioLDM2CodecConfig
    from javis.model.encoders.imagebind import ImageBindTextConfig
    from javis.model.encoders.t5 import T5EncoderConfig
    from javis.model.video_vae import OpenSoraVideoCodecConfig

    parts: dict[str, Any] = {
        "text_encoder": T5EncoderConfig,
        "prior_text_encoder": ImageBindTextConfig,
        "video_codec": OpenSoraVideoCodecConfig,
        "audio_codec": AudioLDM2CodecConfig,
    }
    if size == "full":
        return {name: config() for name, config in parts.items()} | {"model": JavisDiTConfig(), "prior": PriorConfig()}
    made: dict[str, Any] = {name: config.toy() for name, config in parts.items()}
    text, told = made["text_encoder"], made["prior_text_encoder"]
    made["model"] = JavisDiTConfig(
        hidden_size=48, num_heads=2, depth=2, mlp_ratio=2.0, caption_channels=text.channels,
        caption_length=text.max_length, spatial_prior_len=4, temporal_prior_len=4, prior_channels=16,
    )  # fmt: skip
    made["prior"] = PriorConfig(
        text_channels=told.channels, spatial_token_num=4, temporal_token_num=4, hidden_size=32, out_dim=16,
        num_heads=4, num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    return made


def check_fit(parts: Mapping[str, Any]) -> None:
    """Raise `UsageError` unless the sizes of the components agree where they meet."""
    model, prior = parts["model"].config, parts["prior"].config
    text, told = parts["text_encoder"].config, parts["prior_text_encoder"].config
    video, audio = parts["video_codec"].config, parts["audio_codec"].config
    for giver, gives, taker, takes, what in (
        ("text_encoder", text.channels, "transformer", model.caption_channels, "channels of the captions"),
        ("prior_text_encoder", told.channels, "prior", prior.text_channels, "channels of the captions"),
        ("prior", prior.out_dim, "transformer", model.prior_channels, "channels of the priors"),
        ("prior", prior.spatial_token_num, "transformer", model.spatial_prior_len, "spatial prior tokens"),
        ("prior", prior.temporal_token_num, "transformer", model.temporal_prior_len, "temporal prior tokens"),
        ("video_vae", video.temporal.embed_dim, "transformer", model.video_channels, "channels of the video latents"),
        ("audio_vae", audio.vae.latent_channels, "transformer", model.audio_channels, "channels of the audio latents"),
    ):
        if gives != takes:
            raise UsageError(
                f"components do not fit each other: {giver!r} has {gives} {what}, {taker!r} expects {takes}"
            )
