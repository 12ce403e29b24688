"""From prompts to captions: every rule by hand, and the whole against the same rules in diffusers."""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from javis.errors import UsageError
from javis.model.encoders.preprocess import RULES, Rule, clean_caption, clean_once, fix_text, prepare_prompt

# What a rule is about -> text before and after that rule alone.
BY_HAND = {
    "<person> of anonymised captions": ("a <person> walks", "a person walks"),
    "urls": ("see https://a bc.com/x-y/ or me.com@b", "see a  or me.com@b"),
    "urls that start with www:": ("see www:/x here", "see x here"),
    "@nicknames": ("by @joe_1, ok", "by , ok"),
    "Chinese characters, strokes, hexagrams; Katakana extensions; enclosed letters": ("a猫b㊗cかd", "abcかd"),
    "dashes of all kinds": ("a – b —— c", "a - b - c"),
    "double quotes of all kinds": ("«a“ `b´", '"a" "b"'),
    "single quotes of all kinds": ("it’s ‘so’", "it's 'so'"),
    "&quot;": ("&quot;a&quot b", "a b"),
    "&amp": ("a&amp;b", "a;b"),
    "IP addresses": ("at 10.0.0.1!", "at  !"),
    "times at the end (numbers of articles)": ("a 7:45 ", "a "),
    "line ends that were written out": (r"a\nb", "a b"),
    "#1 to #123": ("#1 #1234", " #1234"),
    "#12345 and longer": ("#1234 #12345", "#1234 "),
    "123456 and longer": ("12345 123456", "12345 "),
    "file names": ("in dog.1.jpgx cat.png", "in x "),
    "repeated quotes": ("\"'\"a''", '"a"'),
    "repeated full stops": ("a...b.", "a b."),
    "special characters": ("a(#b*)/c", "a b c"),
    "full stops that stand alone": ("a . b.", "a b."),
    "jc6640": ("jc6640 abcd123 a12", " abcd123 a12"),
    "jc6640vc": ("jc6640vc a1", " a1"),
    "6640vc231": ("6640vc231 6a", " 6a"),
    "shipping": ("worldwide free shipping, shipping", ", "),
    "downloads": ("free download free now", " now"),
    "click for, click on": ("click on it, click at", ", click at"),
    "kinds of files": ("a png images of", "a  of"),
    "page 12": ("page 12 of pages", " of pages"),
    "j2d1a2a": ("j2d1a2a b2", "  b2"),
    "640x480": ("at 640x480 or 1.5×2", "at  or "),
    "blanks before a colon": ("so :  yes", "so: yes"),
    "no blank after a comma, full stop or slash": ("a,b 1,2 c.d", "a, b 1,2 c. d"),
    "runs of white space": ("a \t\n b", "a b"),
    "quotes around everything": ('"it\'s"', "it's"),
    "marks at the start": (",-a", "-a"),
    "marks at the end": ("a+-", "a+"),
    ".only-a-file-ending": (".png-x", ""),
}
TABLE = {rule.about: rule for rule in RULES if isinstance(rule, Rule)}


def test_every_rule_has_its_example() -> None:
    assert set(BY_HAND) == set(TABLE)


@pytest.mark.parametrize("name", BY_HAND)
def test_rule(name: str) -> None:
    before, after = BY_HAND[name]
    assert TABLE[name](before) == after != before


def test_text_is_repaired_and_entities_are_resolved_twice() -> None:
    assert fix_text("  schÃ¶n &amp;lt; 3 ") == "schön < 3"
    assert fix_text("< &amp;lt; 3") == "< < 3"  # text with tags: ftfy leaves entities alone


def test_tags_and_encoded_characters_go() -> None:
    assert clean_once("a%20<b>Bold</b>+dog<br/>barks<!-- no --> ") == "a bold dogbarks"


def test_compounds_are_split_only_if_they_are_long() -> None:
    assert clean_once("this-is-my cute_cat") == "this-is-my cute_cat"
    assert clean_once("this-is-my-cute_cat") == "this is my cute cat"


def test_the_order_of_the_steps() -> None:
    # The file name goes before "/" becomes a blank, and the blank that is left is collapsed after that.
    assert clean_caption("A photo/of/dog.jpg of “A DOG” ... barking , loudly") == 'a of "a dog" barking , loudly'
    # What was encoded twice needs both passes.
    assert clean_once("%2541 dog") == "%41 dog" and clean_caption("%2541 dog") == "a dog"


def test_the_score_is_part_of_the_caption() -> None:
    assert prepare_prompt("A Dog.") == "a dog. aesthetic score: 6.5."
    assert prepare_prompt("a dog. aesthetic score: 5.0.") == "a dog. aesthetic score: 5.0."
    assert prepare_prompt("A Dog", aesthetic_score=None) == "a dog"
    assert prepare_prompt("") == "aesthetic score: 6.5."
    assert prepare_prompt("", aesthetic_score=None) == ""
    assert prepare_prompt("🎉 party", aesthetic_score=None) == "🎉 party"


def test_a_book_is_refused() -> None:
    with pytest.raises(UsageError, match="10001 characters"):
        prepare_prompt("a" * 10_001)


def test_text_without_a_utf8_form_is_refused() -> None:
    with pytest.raises(UsageError, match="not valid text"):
        prepare_prompt("a \ud83d dog")


@pytest.fixture(scope="module")
def of_diffusers() -> Callable[[str], str]:
    """The same rules in diffusers; they lack the stripping of blanks after the repair, which the official code has."""
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as module

    patched = SimpleNamespace(unescape=lambda text: html.unescape(text).strip())

    def clean(text: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "html", patched)
            pipeline = module.PixArtAlphaPipeline
            return pipeline._text_preprocessing(SimpleNamespace(
                _clean_caption=lambda t: pipeline._clean_caption(pipeline, t)
            ), text, clean_caption=True)[0]  # fmt: skip

    return clean


PIECES = [
    *(text for pair in BY_HAND.values() for text in pair), *'"\'.,:;-_+@#&%<>/\\ \n()', "<i>", "</i>", "&lt;", "&amp;",
    "&#39;", "Ö", "Ã¶", "🎉", "é", "x", "7", "12", "%41", "www.a.com/b", "http://", "<script>a</script>", " a dog ",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=40))
def test_the_whole_is_that_of_diffusers(of_diffusers: Callable[[str], str], text: str) -> None:
    assert clean_caption(text) == of_diffusers(text)


@pytest.mark.parametrize(
    "piece", ["a", "a ", "a.", "1.", "a-", "a1", "<a>", "&amp;", "x.png", "x.co", "-a.", "/", "(", " .", "🎉"]
)
def test_ten_thousand_characters_take_no_time(piece: str) -> None:
    start = time.process_time()
    prepare_prompt(piece * (10_000 // len(piece)))
    assert time.process_time() - start < 2
