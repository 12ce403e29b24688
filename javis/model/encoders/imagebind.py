"""Text encoder of the prior estimator: the text tower of ImageBind (Girdhar et al., 2023), a frozen OpenCLIP ViT-H one.

A pre-norm transformer with causal attention over 77 tokens. The prior estimator takes the states of all tokens as the
trunk leaves them: the layer norm and the projection of ImageBind's head come after the choice of the end token only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.encoders.preprocess import collapse_whitespace, fix_text
from javis.model.encoders.tokens import HashTokenizer, Tokenizer, check_captions
from javis.model.parts import config_from_dict, config_to_dict


@dataclass(frozen=True, kw_only=True)
class ImageBindTextConfig:
    """Sizes of :class:`ImageBindTextEncoder`; the defaults are those of ``imagebind_huge``."""

    vocab_size: int = 49408
    width: int = 1024  # of the hidden states
    layers: int = 24
    heads: int = 16
    context_length: int = 77  # tokens of a caption, the start and the end mark included
    mlp_ratio: int = 4
    norm_eps: float = 1e-6
    final_norm: bool = False  # apply the head's layer norm to every token

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads}")

    @property
    def channels(self) -> int:
        return self.width

    def to_dict(self) -> dict[str, Any]:
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageBindTextConfig:
        return config_from_dict(cls, values)

    @classmethod
    def toy(cls) -> ImageBindTextConfig:
        """The same architecture, tiny."""
        return cls(vocab_size=128, width=32, layers=2, heads=4, context_length=16)


class TextAttention(nn.Module):
    """Causal self-attention with packed query, key and value, under the names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """Attention and a two-layer perceptron (erf-GELU), each after a layer norm and with a residual."""

    def __init__(self, config: ImageBindTextConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.norm_1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = TextAttention(width, config.heads)
        self.norm_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm_2(x))))


class ImageBindTextEncoder(nn.Module):
    """Captions -> hidden states of all 77 tokens.

    Args:
        config: sizes; the defaults are the official ones (353 M parameters).
        tokenizer: captions -> token numbers, padded with 0; by default words are hashed, which suits random weights
            only.
    """

    def __init__(self, config: ImageBindTextConfig | None = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        c = self.config = config or ImageBindTextConfig()
        # The official padding is token 0, which is also that of "!"; the end mark has the highest number.
        self.tokenizer: Tokenizer = tokenizer or HashTokenizer(
            c.vocab_size, c.context_length, start_id=c.vocab_size - 2, end_id=c.vocab_size - 1, pad_id=0
        )
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.position_embedding = nn.Parameter(torch.empty(c.context_length, c.width))
        self.blocks = nn.ModuleList([TextBlock(c) for _ in range(c.layers)])
        self.final_layer_norm = nn.LayerNorm(c.width, eps=c.norm_eps) if c.final_norm else None
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """-> hidden states float32 [B, 77, width] and a mask bool [B, 77] that is True everywhere.

        The prior estimator attends to the padding as well: its official training did.
        """
        check_captions(captions)
        ids, _ = self.tokenizer([collapse_whitespace(fix_text(caption)).lower() for caption in captions])
        with torch.no_grad():
            hidden = self.encode(ids.to(self.token_embedding.weight.device))
        return hidden.float(), torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)

    def encode(self, ids: Tensor) -> Tensor:
        """Token numbers int64 [B, L], L <= context_length -> hidden states [B, L, width]."""
        x = self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x if self.final_layer_norm is None else self.final_layer_norm(x)


_TRUNK = "modality_trunks.text.blocks."
_NAMES = {
    "modality_preprocessors.text.token_embedding.weight": "token_embedding.weight",
    "modality_preprocessors.text.pos_embed": "position_embedding",
    "modality_heads.text.proj.0.weight": "final_layer_norm.weight",
    "modality_heads.text.proj.0.bias": "final_layer_norm.bias",
}


def imagebind_text_keys(names: Sequence[str], *, final_norm: bool = False) -> dict[str, str]:
    """Names of an ImageBind checkpoint -> ours, for those that belong to the text tower.

    Left out are the other modalities, and of the text: the projection and the scale that follow the choice of the end
    token, the causal mask, and the head's layer norm unless ``final_norm``.

    The values are equal but for ``pos_embed``, [1, 77, C] there and [77, C] here: see :func:`imagebind_text_state`.
    """
    found = {}
    for name in names:
        if name.startswith(_TRUNK):
            found[name] = "blocks." + name[len(_TRUNK) :]
        elif name in _NAMES and (final_norm or not name.startswith("modality_heads.")):
            found[name] = _NAMES[name]
    return found


def imagebind_text_state(state: Mapping[str, Tensor], *, final_norm: bool = False) -> dict[str, Tensor]:
    """State dict of ImageBind (all modalities, or the text alone) -> that of :class:`ImageBindTextEncoder`."""
    renamed = {ours: state[name] for name, ours in imagebind_text_keys(list(state), final_norm=final_norm).items()}
    if "position_embedding" in renamed and renamed["position_embedding"].ndim == 3:
        renamed["position_embedding"] = renamed["position_embedding"][0]
    return renamed
