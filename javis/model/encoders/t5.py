"""Caption encoder: the encoder of T5 v1.1 XXL (Raffel et al., 2020; the DeepFloyd weights officially).

The captions are taken as they are: :mod:`javis.model.encoders.preprocess` does what the official code does to a prompt
before it becomes a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from javis.model.encoders.tokens import HashTokenizer, Tokenizer
from javis.model.parts import config_from_dict, config_to_dict, library


@dataclass(frozen=True, kw_only=True)
class T5EncoderConfig:
    """Sizes of :class:`T5Encoder`, under the names of ``transformers.T5Config``; the defaults are T5 v1.1 XXL."""

    vocab_size: int = 32128
    d_model: int = 4096  # width of the hidden states
    d_kv: int = 64  # width of a head
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    pad_token_id: int = 0
    eos_token_id: int = 1
    max_length: int = 300  # tokens of a caption; longer ones are cut

    @property
    def channels(self) -> int:
        return self.d_model

    def to_dict(self) -> dict[str, Any]:
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> T5EncoderConfig:
        return config_from_dict(cls, values)

    @classmethod
    def from_library(cls, values: dict[str, Any], **changes: Any) -> T5EncoderConfig:
        """Take the ``config.json`` of a ``transformers`` T5; what has no meaning here is ignored."""
        return cls(**({name: values[name] for name in _LIBRARY_FIELDS if name in values} | changes))

    def to_library(self) -> dict[str, Any]:
        """Arguments of ``transformers.T5Config``."""
        values = {name: getattr(self, name) for name in _LIBRARY_FIELDS}
        return values | {"tie_word_embeddings": False, "is_encoder_decoder": False, "use_cache": False}

    @classmethod
    def toy(cls) -> T5EncoderConfig:
        """The same architecture, tiny."""
        return cls(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, max_length=24)


_LIBRARY_FIELDS = tuple(name for name in T5EncoderConfig.__dataclass_fields__ if name != "max_length")


class T5Encoder(nn.Module):
    """Captions -> hidden states of T5's encoder.

    ``model`` is a ``transformers.T5EncoderModel``: its state dict is what ``model.safetensors`` of a folder of that
    library holds (the embedding table once, as ``shared.weight``).

    Args:
        config: sizes; the defaults are the official ones (4.76 B parameters).
        tokenizer: captions -> token numbers; by default words are hashed, which suits random weights only.

    Raises:
        UsageError: ``transformers`` is not installed.
    """

    def __init__(self, config: T5EncoderConfig | None = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config or T5EncoderConfig()
        c = self.config
        self.tokenizer: Tokenizer = tokenizer or HashTokenizer(
            c.vocab_size, c.max_length, start_id=None, end_id=c.eos_token_id, pad_id=c.pad_token_id
        )
        transformers = library("transformers")
        self.model = transformers.T5EncoderModel(transformers.T5Config(**c.to_library())).eval()
        self._tie()
        self.model.register_load_state_dict_pre_hook(_one_embedding_table)

    def _tie(self) -> None:
        """One embedding table: the encoder's is the shared one."""
        self.model.encoder.embed_tokens.weight = self.model.shared.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> T5Encoder:
        # Moving from the meta device gives every place of a tied parameter a tensor of its own.
        super()._apply(fn, recurse)
        self._tie()
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As of ``nn.Module``; either name of the embedding table will do."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._tie()
        return result

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """-> hidden states float32 [B, max_length, channels] and mask bool [B, max_length], True = token.

        Every caption is padded to the full length, so that a caption's states do not depend on the batch. What stands
        beyond the mask means nothing.
        """
        ids, mask = self.tokenizer(captions)
        device = self.model.shared.weight.device
        ids, mask = ids.to(device), mask.to(device)
        with torch.no_grad():
            hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return hidden.float(), mask


def _one_embedding_table(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Files hold the embedding table under either name or both."""
    names = [prefix + name for name in ("shared.weight", "encoder.embed_tokens.weight")]
    for name, other in (names, names[::-1]):
        if name in state and other not in state:
            state[other] = state[name]
