"""Tokenizers of the text encoders: lengths, marks, padding; vocabularies made here against rules written out here."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
import torch

from javis.errors import UsageError
from javis.model.encoders.tokens import HashTokenizer, load_tokenizer, write_clip_tokenizer

LINES = ["a red ball bounces on the left", "a dog barks twice", "the ball is red", "rain on the roof", "ball ball dog"]
ENCODER = {"length": 12, "pad_id": 0}


@pytest.fixture(scope="session")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small sentencepiece vocabulary, as T5's are: pad 0, end 1, unknown 2."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20), model_prefix=str(folder / "spiece"), vocab_size=48, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder


def likeliest(text: str, scores: dict[str, float]) -> list[str]:
    """The unigram model (Kudo, 2018): of all ways to cut a text into pieces, the one with the highest sum of scores."""
    best: list[tuple[float, list[str]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        ways = [
            (best[i][0] + scores[text[i:end]], [*best[i][1], text[i:end]]) for i in range(end) if text[i:end] in scores
        ]
        best.append(max(ways, default=(-1e9, [])))
    return best[-1][1]


def test_t5_tokens_are_the_likeliest_pieces_and_the_end(spiece: Path) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    scores = {piece: model.get_score(i) for piece, i in pieces.items() if i > 2}
    tokenizer = load_tokenizer(spiece, kind="T5Tokenizer", length=40, pad_id=0)
    captions = ["a red dog", "", "the  left roof bounces ", "🎉"]
    ids, mask = tokenizer(captions)
    assert ids.shape == mask.shape == (4, 40) and ids.dtype == torch.long and mask.dtype == torch.bool
    assert ids[3, :4].tolist() == [pieces["▁"], 2, 1, 0]  # a blank, unknown, the end, padding
    for i, caption in enumerate(captions[:3]):
        words = caption.split()
        expected = [*(pieces[p] for p in likeliest("".join(f"▁{word}" for word in words), scores)), 1]
        assert len(expected) > len(words) or not words
        assert ids[i].tolist() == expected + [0] * (40 - len(expected))
        assert mask[i].tolist() == [True] * len(expected) + [False] * (40 - len(expected))


def test_long_captions_keep_their_end_mark(spiece: Path) -> None:
    tokenizer = load_tokenizer(spiece, kind="T5Tokenizer", **ENCODER)
    ids, mask = tokenizer(["a dog barks " * 900])  # more than 10,000 characters
    assert mask.all() and ids[0, -1] == 1 and not (ids[0, :-1] == 1).any()


# A vocabulary file of CLIP: a title, then merges, best first. "</w>" marks the end of a word.
MERGES = ["t h", "th e</w>", "b a", "l l</w>", "ba ll</w>", "d o", "do g</w>", "' s</w>", "r e", "re d</w>"]


def write_merges(path: Path, *, zipped: bool = True) -> Path:
    data = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *MERGES, ""]).encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


def by_definition(words: list[str], vocabulary: dict[str, int]) -> list[int]:
    """Byte pair encoding: start from characters, apply the best merge anywhere in the word until none is left."""
    merges = [tuple(merge.split()) for merge in MERGES]
    ids = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while found := [m for m in merges if m in pairwise(parts)]:
            at = list(pairwise(parts)).index(found[0])
            parts[at : at + 2] = ["".join(found[0])]
        ids += [vocabulary[part] for part in parts]
    return ids


@pytest.mark.parametrize("zipped", [True, False])
def test_clip_tokens_follow_the_merges(tmp_path: Path, zipped: bool) -> None:
    write_clip_tokenizer(write_merges(tmp_path / "bpe", zipped=zipped), tmp_path / "clip")
    vocabulary = json.loads((tmp_path / "clip" / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256 and vocabulary["th"] == 512
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    assert (start, end) == (len(vocabulary) - 2, len(vocabulary) - 1)
    tokenizer = load_tokenizer(tmp_path / "clip", kind="CLIPTokenizer", length=20, pad_id=0)
    ids, mask = tokenizer(["the dog's ball!", "red 12"])
    for i, words in enumerate((["the", "dog", "'s", "ball", "!"], ["red", "1", "2"])):
        expected = [start, *by_definition(words, vocabulary), end]
        assert ids[i].tolist() == expected + [0] * (20 - len(expected))
        assert mask[i].sum() == len(expected)
    long_ids, long_mask = tokenizer(["dog " * 100])
    assert long_mask.all() and long_ids[0, 0] == start and long_ids[0, -1] == end and (long_ids[0, 1:-1] < start).all()
    # Bytes that are printable in Latin-1 come first, in order; the others follow, the last of them 0xAD.
    first = sorted(vocabulary, key=vocabulary.__getitem__)[:256]
    assert first[94:96] == ["¡", "¢"] and first[105:107] == ["¬", "®"] and first[188] == "Ā" and first[255] == "Ń"
    assert set(first) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    for text, size in (("🎉", 4), ("\u00ad\u042d", 4), ("\x01\x7f", 2)):  # unknown pieces would become end marks
        ids, mask = tokenizer([text])
        assert mask.sum() == size + 2 and end not in ids[0, 1 : size + 1]


def test_saving_and_loading_changes_nothing(tmp_path: Path, spiece: Path) -> None:
    write_clip_tokenizer(write_merges(tmp_path / "bpe"), tmp_path / "clip")
    for source, kind in ((spiece, "T5Tokenizer"), (tmp_path / "clip", "CLIPTokenizer")):
        tokenizer = load_tokenizer(source, kind=kind, **ENCODER)
        tokenizer.save(tmp_path / kind)
        again = load_tokenizer(tmp_path / kind, kind=kind, **ENCODER)
        assert type(again) is type(tokenizer) is not HashTokenizer
        for first, second in zip(tokenizer(LINES), again(LINES), strict=True):
            assert torch.equal(first, second)


def test_hashed_words(tmp_path: Path) -> None:
    tokenizer = HashTokenizer(50, 6, start_id=48, end_id=49, pad_id=0)
    ids, mask = tokenizer(["A dog, a DOG", "", "one two three four five six seven"])
    assert ids[0, 0] == 48 and ids[0, 1] == ids[0, 4] and ids[0, 5] == 49
    assert ids[1].tolist() == [48, 49, 0, 0, 0, 0] and mask[1].tolist() == [True] * 2 + [False] * 4
    assert ids[2, 5] == 49 and mask[2].all()
    words = ids[:, 1:-1][mask[:, 1:-1] & (ids[:, 1:-1] != 49)]
    assert ((words > 0) & (words < 48)).all()
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path, kind="CLIPTokenizer", length=6, pad_id=0)
    assert torch.equal(again(["a dog"])[0], tokenizer(["a dog"])[0])


@pytest.mark.parametrize("special", [(None, 1, 0), (48, 49, 0), (3, 7, 5)])
def test_hashed_words_never_become_marks(special: tuple[int | None, int, int]) -> None:
    start, end, pad = special
    tokenizer = HashTokenizer(50, 200, start_id=start, end_id=end, pad_id=pad)
    numbers = {tokenizer._word(str(i)) for i in range(2000)}
    assert numbers == set(range(50)) - {start, end, pad}


def test_what_is_wrong_with_a_folder_or_a_caption(tmp_path: Path, spiece: Path) -> None:
    with pytest.raises(UsageError, match=r"spiece\.model is missing"):
        load_tokenizer(tmp_path / "nowhere", kind="T5Tokenizer", **ENCODER)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UsageError, match=r"merges\.txt is missing"):
        load_tokenizer(tmp_path, kind="CLIPTokenizer", **ENCODER)
    (tmp_path / "spiece.model").write_bytes(b"no vocabulary")
    with pytest.raises(UsageError, match="not usable"):
        load_tokenizer(tmp_path, kind="T5Tokenizer", **ENCODER)
    (tmp_path / "hash_tokenizer.json").write_text('{"length": 3}')
    with pytest.raises(UsageError, match="not usable"):
        load_tokenizer(tmp_path, kind="T5Tokenizer", **ENCODER)
    for content in (b"", b"title\none two three\n", b"\x1f\x8bno", b"\xff\xfe\xfd"):
        (tmp_path / "bpe").write_bytes(content)
        with pytest.raises(UsageError, match="vocabulary"):
            write_clip_tokenizer(tmp_path / "bpe", tmp_path / "out")
    with pytest.raises(UsageError, match="vocabulary"):
        write_clip_tokenizer(tmp_path / "missing", tmp_path / "out")
    tokenizer = load_tokenizer(spiece, kind="T5Tokenizer", **ENCODER)
    with pytest.raises(UsageError, match="list of captions"):
        tokenizer("a dog")
    with pytest.raises(UsageError, match="not valid text"):
        tokenizer(["a \udc80 dog"])
