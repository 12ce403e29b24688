"""Caption encoders. The built-in one knows a small vocabulary and has no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TextEncoder(Protocol):
    """Captions -> hidden states."""

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """-> hidden states [B, L, C] and mask bool [B, L], True = valid token."""
        ...


@dataclass(frozen=True, kw_only=True)
class WordEncoderConfig:
    """A vocabulary and the longest caption."""

    vocabulary: tuple[str, ...]
    max_words: int = 24  # captions are padded to it, so that a batch changes nothing
    separator: str = "and"  # starts a new clause
    max_clauses: int = 3
    position_size: int = 16  # channels of the place within the clause

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))

    @property
    def channels(self) -> int:
        return 2 * len(self.vocabulary) + self.max_clauses + self.position_size


class WordEncoder:
    """One-hot words with their context, deterministic and without weights.

    A token holds: its word, all words of its clause (so that attributes of two sources do not mix), the number of the
    clause, and its place in the clause.
    """

    def __init__(self, config: WordEncoderConfig) -> None:
        self.config = config
        self._index = {word: i for i, word in enumerate(config.vocabulary)}

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions in the vocabulary's words -> hidden states [B, max_words, channels], mask [B, max_words].

        Raises:
            ValueError: an unknown word, an empty caption, too many words or clauses.
        """
        rows = [self._encode(caption) for caption in captions]
        length = self.config.max_words
        hidden = torch.zeros(len(rows), length, self.config.channels)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            hidden[i, : len(row)] = row
            mask[i, : len(row)] = True
        return hidden, mask

    def _encode(self, caption: str) -> Tensor:
        c = self.config
        words = caption.split()
        unknown = sorted(set(words) - set(self._index))
        if unknown:
            raise ValueError(f"unknown words {unknown}; the built-in world knows: {' '.join(c.vocabulary)}")
        if not 0 < len(words) <= c.max_words:
            raise ValueError(f"a caption must have 1 to {c.max_words} words, got {len(words)}")
        clauses: list[list[str]] = [[]]
        for word in words:
            if word == c.separator:
                clauses.append([])
            clauses[-1].append(word)
        if len(clauses) > c.max_clauses:
            raise ValueError(f"a caption must have at most {c.max_clauses} clauses, got {len(clauses)}")
        size = len(c.vocabulary)
        rows = []
        for number, clause in enumerate(clauses):
            ids = torch.tensor([self._index[word] for word in clause])
            summary = torch.zeros(size).index_fill_(0, ids, 1.0)
            for place, word in enumerate(ids):
                token = torch.zeros(c.channels)
                token[word] = 1.0
                token[size : 2 * size] = summary
                token[2 * size + number] = 1.0
                half = c.position_size // 2
                angles = place * torch.exp(-math.log(100.0) * torch.arange(half) / half)
                token[2 * size + c.max_clauses :] = torch.cat((angles.sin(), angles.cos()))
                rows.append(token)
        return torch.stack(rows)
