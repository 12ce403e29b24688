"""The grammar: captions parse back, foreign words are named, nothing else than UsageError comes out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from javis.errors import UsageError
from javis.world import VOCABULARY, caption, normalize_prompt, parse_prompt, sample_scene


def test_captions_use_the_vocabulary_and_nothing_else() -> None:
    used = {word for seed in range(1500) for word in caption(sample_scene(seed)).split()}
    assert used == set(VOCABULARY)


def test_short_captions_parse() -> None:
    rng = np.random.default_rng(0)
    shortened = 0
    for seed in range(300):
        scene = sample_scene(seed)
        text = caption(scene, drop=0.4, rng=rng)
        shortened += text != caption(scene)
        for clause, source in zip(parse_prompt(text), scene.sources, strict=True):
            given = {name: value for name, value in clause.items() if value is not None}
            assert given == {name: source.clause[name] for name in given}
            assert clause["shape"] == source.shape and clause["motion"] == source.motion
    assert shortened > 150


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red ball bounces on the left", "a red ball bounces on the left"),
        ("The RED circle, bouncing at the LEFT!", "a red ball bounces on the left"),
        ("an big violet cube is knocking in the centre", "a large purple box knocks in the middle"),
        ("a ball floats", "a ball floats silently"),
        ("a star silently", "a star floats silently"),
        ("bell", "an unseen bell rings"),
        ("a hidden steel bell rings while a tiny square flashes", "an unseen metal bell rings and a small box flashes"),
        ("on the left bounces a ball of glass".replace("of ", ""), "a glass ball bounces on the left"),
    ],
)  # fmt: skip
def test_free_wording(prompt: str, expected: str) -> None:
    assert normalize_prompt(prompt) == expected
    assert normalize_prompt(expected) == expected


def test_open_attributes_are_none() -> None:
    clause = parse_prompt("a red ball bounces")[0]
    assert clause == {
        "size": None,
        "colour": "red",
        "material": None,
        "shape": "ball",
        "motion": "bounces",
        "side": None,
        "visible": True,
        "audible": True,
    }
    assert parse_prompt("an unseen metal bell rings")[0]["visible"] is False
    assert parse_prompt("a red ball floats")[0]["audible"] is False


def test_unknown_words_are_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        parse_prompt("a red dog bounces on the moon")
    message = str(caught.value)
    assert "'dog'" in message and "'moon'" in message and "'red'" not in message
    assert all(word in message.split() for word in VOCABULARY)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "empty"),
        (" ,.! ", "empty"),
        ("x" * 10_000, "10000 characters"),
        ("a red blue ball bounces", "colour"),
        ("a ball bounces and a box knocks and a star flashes", "3 clauses"),
        ("a red ball bounces and", "names nothing"),
        ("a red ball bounces silently", "silent"),
        ("a wooden ball flashes", "material"),
        ("a metal ball floats", "material"),
        ("an unseen red bell rings", "colour"),
        ("an unseen ball bounces", "bell"),
        ("a bell rings silently", "bell"),
    ],
)
def test_unusable_prompts(prompt: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_prompt(prompt)
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(VOCABULARY), max_size=14).map(" ".join)))
def test_any_text_parses_or_is_refused(prompt: str) -> None:
    refusal = None
    try:
        normal = normalize_prompt(prompt)
    except UsageError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal and "\n" not in refusal
    else:
        assert set(normal.split()) <= set(VOCABULARY)
        assert parse_prompt(normal) == parse_prompt(prompt)
