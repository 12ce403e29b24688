"""The text-to-prior transformer of the HiST-Sypo estimator: a pre-norm encoder-decoder over learned queries.

Parameters carry the names of ``torch.nn.Transformer``, so that official weights load directly. The class is our own
because the official model asks ``nn.Transformer`` for ``nn.GELU(approximate="tanh")`` and gets something else twice:

* the fused inference path of ``nn.TransformerEncoderLayer`` computes the exact (erf) GELU; here that is an argument;
* ``nn.TransformerDecoder`` deep-copies its layer, and ``TransformerDecoderLayer.__setstate__`` replaces an activation
  that is a module by ReLU. The recorded outputs of the official code show it: its decoder layers are ReLU layers.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gelu = Literal["erf", "tanh"]


def apply_gelu(x: Tensor, form: Gelu) -> Tensor:
    """The exact ("erf") or the tanh-approximated GELU."""
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


class PackedAttention(nn.Module):
    """Multi-head attention with q, k and v projected by one stacked matrix (layout of ``nn.MultiheadAttention``)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries from x [B, L, C], keys and values from memory [B, M, C] -> [B, L, C]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(source, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for source, weight, bias in zip((x, memory, memory), weights, biases, strict=True)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """x + attention(norm1(x)), then x + linear2(gelu(linear1(norm2(x))))."""

    def __init__(self, width: int, num_heads: int, ffn_size: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = PackedAttention(width, num_heads)
        self.linear1 = nn.Linear(width, ffn_size)
        self.linear2 = nn.Linear(ffn_size, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, gelu: Gelu) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y))
        return x + self.dropout(self.linear2(apply_gelu(self.linear1(self.norm2(x)), gelu)))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the text, ReLU feed-forward; each pre-normed and residual."""

    def __init__(self, width: int, num_heads: int, ffn_size: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = PackedAttention(width, num_heads)
        self.multihead_attn = PackedAttention(width, num_heads)
        self.linear1 = nn.Linear(width, ffn_size)
        self.linear2 = nn.Linear(ffn_size, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y))
        x = x + self.dropout(self.multihead_attn(self.norm2(x), memory))
        return x + self.dropout(self.linear2(F.relu(self.linear1(self.norm3(x)))))


class LayerStack(nn.Module):
    """Layers and the final LayerNorm; only a holder, so that parameter names match ``nn.Transformer``."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)


class PriorTransformer(nn.Module):
    """Decodes query tokens against encoded text; final norms on both sides, no masks, no position embedding."""

    def __init__(
        self, width: int, num_heads: int, encoder_layers: int, decoder_layers: int, ffn_size: int, dropout: float
    ) -> None:
        super().__init__()
        layer = (width, num_heads, ffn_size, dropout)
        self.encoder = LayerStack([EncoderLayer(*layer) for _ in range(encoder_layers)], width)
        self.decoder = LayerStack([DecoderLayer(*layer) for _ in range(decoder_layers)], width)

    def forward(self, text: Tensor, queries: Tensor, encoder_gelu: Gelu) -> Tensor:
        """text [B, L, width], queries [B, M, width] -> [B, M, width]."""
        for encoder_layer in self.encoder.layers:
            text = encoder_layer(text, encoder_gelu)
        text = self.encoder.norm(text)
        for decoder_layer in self.decoder.layers:
            queries = decoder_layer(queries, text)
        return self.decoder.norm(queries)
