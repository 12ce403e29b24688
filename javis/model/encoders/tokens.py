"""Captions -> token numbers, for the two full-size text encoders.

A tokenizer is a callable: captions -> (ids int64 [B, L], mask bool [B, L]), L fixed, True = a token of the caption.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from javis.errors import UsageError
from javis.model.parts import library

CLIP_MERGES = (
    49152 - 256 - 2
)  # merges of CLIP's vocabulary file that are used; 256 bytes, twice, and two marks join them
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"


class Tokenizer(Protocol):
    """Captions -> token numbers of a fixed length."""

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """-> ids int64 [B, L] and mask bool [B, L], True = token of the caption (its end mark included)."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files from which it can be loaded again."""
        ...


class LibraryTokenizer:
    """A tokenizer of ``transformers``: longer captions are cut (the end mark stays), shorter ones padded at the end."""

    def __init__(self, tokenizer: Any, length: int, pad_id: int) -> None:
        self.tokenizer, self.length, self.pad_id = tokenizer, length, pad_id

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        check_captions(captions)
        rows = self.tokenizer(list(captions), truncation=True, max_length=self.length)["input_ids"]
        return _pad(rows, self.length, self.pad_id)

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.tokenizer.save_pretrained(os.fspath(folder))


class SentencePieceTokenizer:
    """A sentencepiece vocabulary as T5 uses it: the pieces of the caption, then the end mark."""

    def __init__(self, file: str | os.PathLike[str], length: int, pad_id: int) -> None:
        self.processor = library("sentencepiece").SentencePieceProcessor(model_file=os.fspath(file))
        self.length, self.pad_id = length, pad_id

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        check_captions(captions)
        rows = [ids[: self.length - 1] + [self.processor.eos_id()] for ids in self.processor.encode(list(captions))]
        return _pad(rows, self.length, self.pad_id)

    def save(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "spiece.model").write_bytes(self.processor.serialized_model_proto())


class HashTokenizer:
    """Stands in for a real tokenizer where there is no vocabulary: with random weights, for speed and memory.

    Every word becomes one token whose number is a checksum of the word: the same in every process.
    """

    def __init__(self, vocab_size: int, length: int, *, start_id: int | None, end_id: int, pad_id: int) -> None:
        self.vocab_size, self.length = vocab_size, length
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.special = sorted({end_id, pad_id} | ({start_id} if start_id is not None else set()))
        if vocab_size <= len(self.special):
            raise ValueError(
                f"a vocabulary of {vocab_size} leaves no room beside the {len(self.special)} special tokens"
            )

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        check_captions(captions)
        rows = []
        for caption in captions:
            words = [self._word(word) for word in re.findall(r"\w+|[^\w\s]", caption.lower())]
            start = [self.start_id] if self.start_id is not None else []
            rows.append([*start, *words[: self.length - 1 - len(start)], self.end_id])
        return _pad(rows, self.length, self.pad_id)

    def _word(self, word: str) -> int:
        number = zlib.crc32(word.encode()) % (self.vocab_size - len(self.special))
        for special in self.special:  # ascending: step over the special numbers
            number += number >= special
        return number

    def save(self, folder: str | os.PathLike[str]) -> None:
        values = {name: getattr(self, name) for name in ("vocab_size", "length", "start_id", "end_id", "pad_id")}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "hash_tokenizer.json").write_text(json.dumps(values) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> HashTokenizer:
        """Inverse of :meth:`save`.

        Raises:
            UsageError: the file is missing or damaged.
        """
        file = Path(folder) / "hash_tokenizer.json"
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{str(file)!r} is not usable ({error}); write it again with --random-weights") from error


def load_tokenizer(folder: str | os.PathLike[str], *, length: int, pad_id: int, kind: str) -> Tokenizer:
    """Read the tokenizer of a folder.

    Args:
        folder: files of a ``transformers`` tokenizer (T5: spiece.model or tokenizer.json; CLIP: vocab.json and
            merges.txt, or tokenizer.json), or what :meth:`HashTokenizer.save` wrote.
        length: tokens of a caption.
        pad_id: number that fills up short captions.
        kind: class name in ``transformers``, "T5Tokenizer" or "CLIPTokenizer".

    Raises:
        UsageError: missing or unusable files.
    """
    folder = Path(folder)
    files = {"T5Tokenizer": ("spiece.model",), "CLIPTokenizer": ("vocab.json", "merges.txt")}[kind]
    if (folder / "hash_tokenizer.json").is_file():
        return HashTokenizer.load(folder)
    if not (folder / "tokenizer.json").is_file():
        for name in files:
            if not (folder / name).is_file():
                raise UsageError(
                    f"tokenizer folder {str(folder)!r}: {name} is missing; expected {' and '.join(files)}, or "
                    "tokenizer.json"
                )
    try:
        if kind == "T5Tokenizer" and (folder / "spiece.model").is_file():  # needs no conversion, and no protobuf for it
            return SentencePieceTokenizer(folder / "spiece.model", length, pad_id)
        tokenizer = getattr(library("transformers"), kind).from_pretrained(os.fspath(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        raise UsageError(
            f"tokenizer folder {str(folder)!r} is not usable ({' '.join(str(error).split())[:200]}); copy it again"
        ) from error
    return LibraryTokenizer(tokenizer, length, pad_id)


def check_captions(captions: Sequence[str]) -> None:
    """UsageError for a single string, and for text that has no UTF-8 form (lone surrogates)."""
    if isinstance(captions, str):
        raise UsageError("expected a list of captions, got one string; put it in a list")
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the caption {caption!r:.60} is not valid text ({error.reason}); save it as UTF-8"
            ) from error


def write_clip_tokenizer(merges: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Make vocab.json and merges.txt from CLIP's vocabulary file, which ImageBind ships.

    Args:
        merges: ``bpe_simple_vocab_16e6.txt``, gzipped or not: a title line, then one merge per line, best first.
        folder: where to write to.

    Raises:
        UsageError: the file is missing or not such a list.
    """
    path = Path(merges)
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UsageError(
            f"vocabulary {str(path)!r} cannot be read ({error}); expected bpe_simple_vocab_16e6"
        ) from error
    pairs = [line.split() for line in lines[1 : CLIP_MERGES + 1] if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"vocabulary {str(path)!r} is no list of merges; expected bpe_simple_vocab_16e6.txt.gz")
    characters = _byte_characters()
    words = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in pairs), CLIP_START, CLIP_END]
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({word: number for number, word in enumerate(words)}, ensure_ascii=False)
    (target / "vocab.json").write_text(vocabulary, encoding="utf-8")
    listed = "\n".join(" ".join(pair) for pair in pairs)
    (target / "merges.txt").write_text(f"#version: 0.2\n{listed}\n", encoding="utf-8")


def _byte_characters() -> list[str]:
    """One printable character per byte, in the order of CLIP's vocabulary: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _pad(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids, mask
