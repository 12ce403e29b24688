"""Synchformer (Iashin et al., arXiv 2401.16423): logits over 21 offsets between picture and sound, for DeSync.

Three parts under the names of the public ``synchformer_state_dict.pth``: a Motionformer with divided attention over
segments of 16 frames, an AST over the mel spectra of the same segments, and a transformer over the tokens of both in 14
segments. A segment is 0.64 s at 25 fps and 16 kHz, and begins every 0.32 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.errors import UsageError
from javis.eval.extractors.base import Extractor
from javis.eval.extractors.pictures import as_rgb, clip_frames, nearest_frames
from javis.eval.extractors.sound import mono_at, to_length
from javis.eval.extractors.weights import load_weights
from javis.eval.metrics.protocol import MetricProtocol
from javis.eval.metrics.windows import (
    SEGMENT_FRAME_STRIDE,
    SEGMENT_FRAMES,
    SEGMENT_SAMPLE_STRIDE,
    SEGMENT_SAMPLES,
    SYNC_FPS,
    SYNC_RATE,
    SYNC_SEGMENTS,
    desync_segments,
    desync_windows,
)
from javis.model.parts import library

SIZE, PATCH, BANDS, SPECTRA = 224, 16, 128, 66
SECONDS = 8.0  # of a clip that JavisBench looks at
MEL_MEAN, MEL_STD = -4.2677393, 4.5689974
BATCH = 4  # segments at a time
IGNORED = (r"vfeat_extractor\.(patch_embed|head)\..*", r"afeat_extractor\.classifier\..*")  # of the pretraining


@dataclass(frozen=True, kw_only=True)
class SynchformerConfig:
    """Sizes; the defaults are the public ones."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    joint_layers: int = 3
    joint_heads: int = 8
    classes: int = 21


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[B, N, C] and [B, M, C] twice -> [B, N, C]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class DividedAttention(nn.Module):
    """Attention of each token to its group and the class token; the class token sees all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, moments: int, over_time: bool) -> Tensor:
        """[B, 1 + moments * places, C]; groups are the moments of a place, or the places of a moment."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        first = _attend(q[:, :1], k, v, self.heads)

        def grouped(t: Tensor) -> Tensor:
            t = t[:, 1:].unflatten(1, (moments, -1))
            return (t.transpose(1, 2) if over_time else t).flatten(0, 1)

        groups = (x.shape[1] - 1) // moments if over_time else moments
        keys, values = (torch.cat((t[:, :1].repeat_interleave(groups, dim=0), grouped(t)), dim=1) for t in (k, v))
        rest = _attend(grouped(q), keys, values, self.heads).unflatten(0, (len(x), groups))
        rest = (rest.transpose(1, 2) if over_time else rest).flatten(1, 2)
        return self.proj(torch.cat((first, rest), dim=1))


class DividedBlock(nn.Module):
    """Attention over time, over places, and a perceptron, each behind a layer norm and with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attn = DividedAttention(width, heads)
        self.timeattn = DividedAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, moments: int) -> Tensor:
        x = x + self.timeattn(self.norm3(x), moments, True)
        x = x + self.attn(self.norm1(x), moments, False)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Aggregate(nn.TransformerEncoderLayer):
    """A class token that gathers the tokens beside it: [B, N, C] -> [B, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, 4 * width, 0.0, F.gelu, layer_norm_eps=1e-6, batch_first=True, norm_first=True)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def gather(self, x: Tensor) -> Tensor:
        return self(torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1))[:, 0]


class Conv(nn.Module):
    """A convolution under the name ``proj``."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.proj = conv


class Motionformer(nn.Module):
    """Segments of pictures [B, 3, 16, 224, 224] in -1..1 -> [B, 8, C], one vector for two frames."""

    def __init__(self, c: SynchformerConfig) -> None:
        super().__init__()
        self.moments = SEGMENT_FRAMES // 2
        places = (SIZE // PATCH) ** 2
        kernel = (2, PATCH, PATCH)
        self.patch_embed_3d = Conv(nn.Conv3d(3, c.width, kernel, kernel))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + places, c.width))
        self.temp_embed = nn.Parameter(torch.zeros(1, self.moments, c.width))
        self.blocks = nn.ModuleList([DividedBlock(c.width, c.heads) for _ in range(c.layers)])
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.spatial_attn_agg = Aggregate(c.width, c.heads)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed_3d.proj(x).flatten(3).permute(0, 2, 3, 1)  # [B, moments, places, C]
        patches = patches + self.pos_embed[:, None, 1:] + self.temp_embed[:, :, None]
        x = torch.cat(((self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), patches.flatten(1, 2)), dim=1)
        for block in self.blocks:
            x = block(x, self.moments)
        places = self.norm(x)[:, 1:].unflatten(1, (self.moments, -1)).flatten(0, 1)
        return self.spatial_attn_agg.gather(places).unflatten(0, (-1, self.moments))


class Dense(nn.Module):
    """A linear layer under the name ``dense``."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, out)


class QueryKeyValue(nn.Module):
    """Three linear layers and the attention between them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self.query(x), self.key(x), self.value(x), self.heads)


class SpectrumAttention(nn.Module):
    """Self-attention with its projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = QueryKeyValue(width, heads)
        self.output = Dense(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output.dense(self.attention(x))


class SpectrumLayer(nn.Module):
    """A layer of the AST, under the names that transformers gave it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SpectrumAttention(width, heads)
        self.intermediate = Dense(width, 4 * width)
        self.output = Dense(4 * width, width)
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


class SpectrumPatches(nn.Module):
    """Patches of 16 x 16 every 10 bands and every 10 spectra."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(1, width, 16, 10)


class SpectrumEmbeddings(nn.Module):
    """Spectra [B, 128, 66] -> two marks and 12 x 6 patches with their positions [B, 74, C]."""

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.patch_embeddings = SpectrumPatches(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 2 + patches, width))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embeddings.projection(x[:, None]).flatten(2).transpose(1, 2)
        marks = torch.cat((self.cls_token, self.distillation_token), dim=1).expand(len(x), -1, -1)
        return torch.cat((marks, patches), dim=1) + self.position_embeddings


class Ast(nn.Module):
    """Spectra -> normed states of the marks and patches."""

    def __init__(self, c: SynchformerConfig, patches: int) -> None:
        super().__init__()
        self.embeddings = SpectrumEmbeddings(c.width, patches)
        self.encoder = nn.ModuleDict(
            {"layer": nn.Sequential(*[SpectrumLayer(c.width, c.heads) for _ in range(c.layers)])}
        )
        self.layernorm = nn.LayerNorm(c.width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layernorm(self.encoder["layer"](self.embeddings(x)))


class SpectrumTransformer(nn.Module):
    """Mel spectra of segments [B, 128, 66] -> [B, 6, C], one vector for 0.1 s."""

    def __init__(self, c: SynchformerConfig) -> None:
        super().__init__()
        self.bands, self.moments = ((size - 16) // 10 + 1 for size in (BANDS, SPECTRA))
        self.ast = Ast(c, self.bands * self.moments)
        self.freq_attn_agg = Aggregate(c.width, c.heads)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.ast(x)[:, 2:].unflatten(1, (self.bands, self.moments))
        return self.freq_attn_agg.gather(grid.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, self.moments))


class JointBlock(nn.Module):
    """Attention and a perceptron, each behind a layer norm and with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("key", "query", "value", "proj")})
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        mixed = _attend(self.attn["query"](y), self.attn["key"](y), self.attn["value"](y), self.heads)
        x = x + self.attn["proj"](mixed)
        return x + self.mlp(self.ln2(x))


class Positions(nn.Module):
    """Learnt positions under the name ``pos_emb``."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.zeros(1, tokens, width))


class JointTransformer(nn.Module):
    """Tokens of 14 segments of both streams -> logits of the offset."""

    def __init__(self, c: SynchformerConfig, tokens: int) -> None:
        super().__init__()
        self.vis_in_lnorm, self.aud_in_lnorm = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.OFF_tok = nn.Parameter(torch.zeros(1, 1, c.width))
        self.MOD_tok = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_emb_cfg = Positions(2 + tokens, c.width)
        self.blocks = nn.Sequential(*[JointBlock(c.width, c.joint_heads) for _ in range(c.joint_layers)])
        self.ln_f = nn.LayerNorm(c.width)
        self.off_head = nn.Linear(c.width, c.classes)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        off, between = (token.expand(len(video), -1, -1) for token in (self.OFF_tok, self.MOD_tok))
        x = torch.cat((off, self.vis_in_lnorm(video), between, self.aud_in_lnorm(audio)), dim=1)
        return self.off_head(self.ln_f(self.blocks(x + self.pos_emb_cfg.pos_emb))[:, 0])


class Synchformer(nn.Module):
    """The three parts; `compare` takes what the first two made of 14 segments."""

    def __init__(self, config: SynchformerConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or SynchformerConfig()
        self.vfeat_extractor = Motionformer(c)
        self.afeat_extractor = SpectrumTransformer(c)
        self.vproj, self.aproj = nn.Linear(c.width, c.width), nn.Linear(c.width, c.width)
        tokens = SYNC_SEGMENTS * (self.vfeat_extractor.moments + self.afeat_extractor.moments)
        self.transformer = JointTransformer(c, tokens)

    def compare(self, video: Tensor, audio: Tensor) -> Tensor:
        """[B, 14, 8, C] and [B, 14, 6, C] -> logits [B, 21]."""
        return self.transformer(self.vproj(video.flatten(1, 2)), self.aproj(audio.flatten(1, 2)))


@lru_cache(maxsize=1)
def _mel_filters() -> Tensor:
    filters = library("transformers.audio_utils").mel_filter_bank(
        513, BANDS, 0.0, SYNC_RATE / 2, SYNC_RATE, None, "htk"
    )
    return torch.from_numpy(np.asarray(filters, np.float32)).T


def segment_spectra(segments: Tensor) -> Tensor:
    """Samples [S, 10240] at 16 kHz -> normalised log mel spectra [S, 128, 66]."""
    spectra = torch.stft(
        segments, 1024, 160, 400, torch.hann_window(400), center=True, pad_mode="reflect", return_complex=True
    )
    levels = torch.log(_mel_filters() @ spectra.abs().square() + 1e-6)
    return (to_length(levels, SPECTRA) - MEL_MEAN) / (2 * MEL_STD)


class SynchformerExtractor(Extractor):
    """Logits of the offset between picture and sound; there is no embedding of one of them alone."""

    name = "synchformer"
    modalities = frozenset({"pair"})

    def __init__(self, model: Synchformer, weights_hash: str, device: str) -> None:
        self.model, self.weights_hash, self.device = model, weights_hash, device

    def sync_logits(self, frames: np.ndarray, fps: float, waveform: np.ndarray, rate: int) -> np.ndarray:
        """Logits [windows, 21] of the first 8 s of a clip, for `javis.eval.metrics.desync`.

        Args:
            frames: uint8 [T, H, W, 3] at ``fps``; brought to 25 fps.
            waveform: mono [N] at ``rate`` Hz; brought to 16 kHz. The shorter stream decides on the number of segments.

        Raises:
            UsageError: less than one segment (0.64 s).
        """
        frames = as_rgb(frames)
        frames = frames[nearest_frames(len(frames), fps, SYNC_FPS)][: int(SECONDS * SYNC_FPS)]
        wave = torch.from_numpy(mono_at(waveform, rate, SYNC_RATE)[: int(SECONDS * SYNC_RATE)])
        count = desync_segments(len(frames), len(wave))
        if count < 1:
            raise UsageError(
                f"the clip has {len(frames) / SYNC_FPS:.2f} s of picture and {len(wave) / SYNC_RATE:.2f} s of sound; "
                "Synchformer needs at least 0.64 s of both"
            )
        with torch.inference_mode():
            pixels = clip_frames(frames, SIZE, (0.5,) * 3, (0.5,) * 3)
            video = pixels.unfold(0, SEGMENT_FRAMES, SEGMENT_FRAME_STRIDE)[:count].permute(0, 1, 4, 2, 3)
            audio = segment_spectra(wave.unfold(0, SEGMENT_SAMPLES, SEGMENT_SAMPLE_STRIDE)[:count])
            seen = torch.cat([self.model.vfeat_extractor(part.to(self.device)) for part in video.split(BATCH)])
            heard = self.model.afeat_extractor(audio.to(self.device))
            windows = torch.tensor(desync_windows(count), device=seen.device)
            return np.asarray(self.model.compare(seen[windows], heard[windows]).float().cpu().numpy())


def load(folder: Path, device: str, protocol: MetricProtocol) -> SynchformerExtractor:
    model = Synchformer()
    found = load_weights(model, folder, "Synchformer (synchformer_state_dict.pth)", ignored=IGNORED)
    return SynchformerExtractor(model.to(device), found, device)
