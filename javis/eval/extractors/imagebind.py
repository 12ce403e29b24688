"""ImageBind (Girdhar et al., arXiv 2305.05665): pictures, sounds and texts in one space of 1024 dimensions.

Three pre-norm transformers under the names of the public ``imagebind_huge.pth``. The text tower is the one of the prior
estimator (`javis.model.encoders.imagebind`), here with its head: the state of the end mark, normed and projected. All
embeddings are of unit length; the scales that ImageBind multiplies them by do not change a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.convert.imagebind import find_vocabulary, write_vocabulary
from javis.errors import UsageError
from javis.eval.extractors.base import Extractor
from javis.eval.extractors.pictures import as_pixels, as_rgb, clip_frames, normalised, short_side
from javis.eval.extractors.sound import kaldi_filterbank, mono_at, to_length
from javis.eval.extractors.weights import load_weights
from javis.eval.metrics.protocol import MetricProtocol
from javis.model.encoders.imagebind import ImageBindTextConfig, ImageBindTextEncoder, imagebind_text_keys
from javis.model.encoders.preprocess import collapse_whitespace, fix_text
from javis.model.encoders.tokens import Tokenizer, check_captions, load_tokenizer

SIZE, RATE = 224, 16000
BANDS, FRAMES = 128, 204  # of the picture of a sound
CLIP_SECONDS, SOUND_CLIPS, PICTURE_CLIPS, CROPS = 2.0, 3, 5, 3
SOUND_MEAN, SOUND_STD = -4.268, 9.138
BATCH = 32

# Public names that no embedding depends on: other modalities, the scales, the causal mask.
IGNORED = (
    r"modality_\w+\.(depth|thermal|imu)\..*",
    r"modality_postprocessors\..*",
    r"modality_preprocessors\.text\.mask",
)


@dataclass(frozen=True, kw_only=True)
class ImageBindConfig:
    """Sizes; the defaults are those of ``imagebind_huge``."""

    out: int = 1024
    vision_width: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    audio_width: int = 768
    audio_layers: int = 12
    audio_heads: int = 12
    text: ImageBindTextConfig = field(default_factory=ImageBindTextConfig)


class Block(nn.Module):
    """Attention and a two-layer perceptron (erf-GELU), each behind a layer norm and with a residual."""

    def __init__(self, width: int, heads: int, *, bias_kv: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, add_bias_kv=bias_kv, batch_first=True)
        self.norm_1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.norm_2 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm_2(x))))


class Tower(nn.Module):
    """Patches -> transformer -> the class token, normed and projected.

    Args:
        stem: convolution that cuts and embeds the patches.
        patches: how many there are.
        stem_norm: layer norm of the patches (sound).
        first_norm: layer norm before the first block (picture).
        bias_kv: one learnt key and value beside those of the tokens (sound).
    """

    def __init__(
        self,
        stem: nn.Module,
        patches: int,
        width: int,
        layers: int,
        heads: int,
        out: int,
        *,
        stem_norm: bool = False,
        first_norm: bool = False,
        bias_kv: bool = False,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stem_norm = nn.LayerNorm(width) if stem_norm else nn.Identity()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.first_norm = nn.LayerNorm(width, eps=1e-6) if first_norm else nn.Identity()
        self.blocks = nn.ModuleList([Block(width, heads, bias_kv=bias_kv) for _ in range(layers)])
        self.head_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Input of the stem [B, ...] -> unit vectors [B, out]."""
        tokens = self.stem_norm(self.stem(x).flatten(2).transpose(1, 2))
        x = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1) + self.pos_embed
        x = self.first_norm(x)
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.head(self.head_norm(x)[:, 0]), dim=-1)


class TextTower(nn.Module):
    """Token numbers -> the state of the end mark (the highest number of a row), normed and projected."""

    def __init__(self, config: ImageBindTextConfig, out: int) -> None:
        super().__init__()
        self.encoder = ImageBindTextEncoder(config)
        self.head_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, out, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, L] -> unit vectors [B, out]."""
        states = self.encoder.encode(ids)[torch.arange(len(ids)), ids.argmax(dim=1)]
        return F.normalize(self.head(self.head_norm(states)), dim=-1)


class ImageBind(nn.Module):
    """The towers of pictures, sounds and texts."""

    def __init__(self, config: ImageBindConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or ImageBindConfig()
        self.vision = Tower(
            nn.Conv3d(3, c.vision_width, (2, 14, 14), (2, 14, 14), bias=False),
            (SIZE // 14) ** 2,
            c.vision_width,
            c.vision_layers,
            c.vision_heads,
            c.out,
            first_norm=True,
        )
        self.audio = Tower(
            nn.Conv2d(1, c.audio_width, 16, 10, bias=False),
            (1 + (BANDS - 16) // 10) * (1 + (FRAMES - 16) // 10),
            c.audio_width,
            c.audio_layers,
            c.audio_heads,
            c.out,
            stem_norm=True,
            bias_kv=True,
        )
        self.text = TextTower(c.text, c.out)


_PLACES = {
    "modality_preprocessors.{m}.cls_token": "{m}.cls_token",
    "modality_preprocessors.{m}.pos_embedding_helper.pos_embed": "{m}.pos_embed",
    "modality_trunks.{m}.pre_transformer_layer.0.": "{m}.first_norm.",
    "modality_trunks.{m}.blocks.": "{m}.blocks.",
    "modality_heads.{m}.0.": "{m}.head_norm.",
    "modality_heads.{m}.2.": "{m}.head.",
}
PREFIXES = {
    "modality_preprocessors.vision.rgbt_stem.proj.1.": "vision.stem.",
    "modality_preprocessors.audio.rgbt_stem.proj.": "audio.stem.",
    "modality_preprocessors.audio.rgbt_stem.norm_layer.": "audio.stem_norm.",
    "modality_heads.text.proj.0.": "text.head_norm.",
    "modality_heads.text.proj.1.": "text.head.",
    **{theirs.format(m=m): ours.format(m=m) for m in ("vision", "audio") for theirs, ours in _PLACES.items()},
}


def rename(public: str) -> str:
    """Public name -> ours; a name that is not known stays, and has no place."""
    if text := imagebind_text_keys([public]):
        return "text.encoder." + text[public]
    for theirs, ours in PREFIXES.items():
        if public.startswith(theirs):
            return ours + public[len(theirs) :]
    return public


class ImageBindExtractor(Extractor):
    """Frames one by one [T, 1024] (AVHScore, JavisScore), clips, sounds and texts [1, 1024] each."""

    name = "imagebind"
    modalities = frozenset({"video", "audio", "text"})

    def __init__(self, model: ImageBind, weights_hash: str, device: str, tokenizer: Tokenizer | None) -> None:
        self.model, self.weights_hash, self.device = model, weights_hash, device
        self.tokenizer = tokenizer

    def embed_video(self, frames: np.ndarray, fps: float) -> np.ndarray:
        """Each frame by itself, as a still of two frames."""
        frames = as_rgb(frames)
        found = [
            self._run(
                self.model.vision, clip_frames(frames[start : start + BATCH], SIZE)[:, :, None].repeat(1, 1, 2, 1, 1)
            )
            for start in range(0, len(frames), BATCH)
        ]
        return np.concatenate(found)

    def embed_clip(self, frames: np.ndarray, fps: float) -> np.ndarray:
        """Mean over five times of 2 s, first and last frame each, and three crops along the longer side."""
        frames = as_rgb(frames)
        views = []
        for start in clip_starts(len(frames) / fps, PICTURE_CLIPS):
            first = min(math.ceil(start * fps - 1e-6), len(frames) - 1)
            last = min(max(math.ceil((start + CLIP_SECONDS) * fps - 1e-6) - 1, first), len(frames) - 1)
            pair = normalised(short_side(as_pixels(frames[[first, last]]), SIZE))
            views += [crop.transpose(0, 1) for crop in crops(pair, SIZE)]
        return self._run(self.model.vision, torch.stack(views)).mean(axis=0, keepdims=True)

    def embed_audio(self, waveform: np.ndarray, rate: int) -> np.ndarray:
        """Mean over three times of 2 s, spread over the sound."""
        wave = mono_at(waveform, rate, RATE)
        pictures = []
        for start in clip_starts(len(wave) / RATE, SOUND_CLIPS):
            part = wave[int(start * RATE) : int((start + CLIP_SECONDS) * RATE)]
            pictures.append((to_length(kaldi_filterbank(part, BANDS), FRAMES) - SOUND_MEAN) / SOUND_STD)
        return self._run(self.model.audio, torch.stack(pictures)[:, None]).mean(axis=0, keepdims=True)

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        check_captions(texts)
        if self.tokenizer is None:
            raise UsageError("imagebind has no vocabulary; put bpe_simple_vocab_16e6.txt.gz beside imagebind_huge.pth")
        ids, _ = self.tokenizer([collapse_whitespace(fix_text(text)).lower() for text in texts])
        return self._run(self.model.text, ids)

    def _run(self, tower: nn.Module, given: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(tower(given.to(self.device)).float().cpu().numpy())


def clip_starts(seconds: float, count: int) -> list[float]:
    """Beginnings of ``count`` parts of 2 s, spread from the first to the last that fits."""
    return [float(start) for start in np.linspace(0.0, max(seconds - CLIP_SECONDS, 0.0), count)]


def crops(pixels: Tensor, size: int) -> list[Tensor]:
    """Three squares [T, 3, size, size] of frames whose short side is ``size``: beginning, middle, end of the other."""
    height, width = pixels.shape[-2:]
    spare = max(height, width) - size
    found = []
    for offset in (0, math.ceil(spare / 2), spare):
        top, left = (offset, 0) if height > width else (0, offset)
        found.append(pixels[..., top : top + size, left : left + size])
    return found


def load(folder: Path, device: str, protocol: MetricProtocol) -> ImageBindExtractor:
    with torch.device("meta"):
        model = ImageBind()
    model.to_empty(device="cpu")
    found = load_weights(model, folder, "ImageBind (imagebind_huge.pth)", rename=rename, ignored=IGNORED)
    return ImageBindExtractor(model.to(device), found, device, read_vocabulary(folder, model.config.text))


def read_vocabulary(folder: Path, config: ImageBindTextConfig) -> Tokenizer | None:
    """The tokenizer of the vocabulary in ``folder``, or None without one."""
    import tempfile

    file = find_vocabulary(folder)
    if file is None:
        return None
    with tempfile.TemporaryDirectory() as made:
        write_vocabulary(file, Path(made))
        return load_tokenizer(made, length=config.context_length, pad_id=0, kind="CLIPTokenizer")
