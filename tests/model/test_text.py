"""The word encoder: what a token holds, and what it must not."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from javis.model.text import WordEncoder, WordEncoderConfig
from javis.world import VOCABULARY, WorldConfig, caption, sample_scene

WORDS = ("a", "and", "red", "blue", "ball", "box", "bounces")
CONFIG = WordEncoderConfig(vocabulary=WORDS, max_words=12)
ENCODER = WordEncoder(CONFIG)
SIZE = len(WORDS)


def words_of(rows: torch.Tensor) -> list[str]:
    return [WORDS[int(row[:SIZE].argmax())] for row in rows]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([w for w in WORDS if w != "and"]), min_size=1, max_size=12))
def test_a_token_holds_its_word_and_those_of_its_clause(words: list[str]) -> None:
    hidden, mask = ENCODER([" ".join(words)])
    assert hidden.shape == (1, 12, CONFIG.channels) and mask.dtype == torch.bool
    assert mask[0].tolist() == [i < len(words) for i in range(12)]
    assert words_of(hidden[0, : len(words)]) == words
    assert (hidden[0, : len(words), :SIZE].sum(1) == 1).all()
    clause = torch.tensor([float(w in words) for w in WORDS])
    assert torch.equal(hidden[0, : len(words), SIZE : 2 * SIZE], clause.expand(len(words), -1))
    assert (hidden[0, len(words) :] == 0).all()


def test_clauses_do_not_mix() -> None:
    hidden, mask = ENCODER(["a red ball and a blue box", "a blue ball and a red box", "a red ball"])
    assert mask.sum(1).tolist() == [7, 7, 3]
    red, blue = WORDS.index("red"), WORDS.index("blue")
    first, second = hidden[0, :3], hidden[0, 3:7]
    assert (first[:, SIZE + red] == 1).all() and (first[:, SIZE + blue] == 0).all()
    assert (second[:, SIZE + blue] == 1).all() and (second[:, SIZE + red] == 0).all()
    numbers = hidden[0, :7, 2 * SIZE : 2 * SIZE + 3]
    assert numbers.argmax(1).tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(hidden[2, :3], first)  # a second clause leaves the first as it was
    assert not torch.equal(hidden[0], hidden[1])  # the colours are exchanged, and it shows


def test_place_in_the_clause_tells_equal_words_apart() -> None:
    hidden, _ = ENCODER(["ball ball", "a ball"])
    assert torch.equal(hidden[0, 0, : 2 * SIZE + 3], hidden[0, 1, : 2 * SIZE + 3])
    assert (hidden[0, 0] - hidden[0, 1]).abs().max() > 0.1
    place = slice(2 * SIZE + 3, None)
    assert torch.equal(hidden[0, 1, place], hidden[1, 1, place])


def test_padding_does_not_depend_on_the_batch() -> None:
    captions = ["a red ball bounces", "a", "a red ball and a blue box"]
    together, masks = ENCODER(captions)
    for i, text in enumerate(captions):
        hidden, mask = ENCODER([text])
        assert torch.equal(hidden[0], together[i]) and torch.equal(mask[0], masks[i])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a green ball", r"unknown words \['green'\]; the built-in world knows: a and red"),
        ("Red ball", r"\['Red'\]"),
        ("", "1 to 12 words, got 0"),
        ("a " * 13, "1 to 12 words, got 13"),
        ("a and a and a and a", "at most 3 clauses, got 4"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ENCODER(["a red ball", text])


def test_configuration_survives_json() -> None:
    assert WordEncoderConfig(**json.loads(json.dumps(asdict(CONFIG)))) == CONFIG


def test_every_caption_of_the_world_fits() -> None:
    encoder, config = WordEncoder(WordEncoderConfig(vocabulary=VOCABULARY)), WorldConfig()
    captions = [caption(sample_scene(seed, config)) for seed in range(200)]
    assert any(" and " in text for text in captions)
    hidden, mask = encoder(captions)
    for i, text in enumerate(captions):
        read = [VOCABULARY[int(row[: len(VOCABULARY)].argmax())] for row in hidden[i][mask[i]]]
        assert " ".join(read) == text
