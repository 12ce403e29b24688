"""The text form of a cache, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from javis.cache_options import CacheConfig, parse_cache
from javis.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", CacheConfig()),
        ("first-block=0.1", CacheConfig(kind="first-block", video=0.1, audio=0.1)),
        ("first-block=inf,most=1", CacheConfig(kind="first-block", video=math.inf, audio=math.inf, most=1)),
        ("tea=0.2, audio=0, most=3", CacheConfig(kind="tea", video=0.2, audio=0.0, most=3)),
        ("attention=2", CacheConfig(kind="attention", temporal=2, prior=2, text=2)),
        (
            "attention=1,text=4,audio-prior=3,low=100,high=900",
            CacheConfig(kind="attention", text=4, audio_prior=3, low=100.0, high=900.0),
        ),
    ],
)
def test_text_form(text: str, expected: CacheConfig) -> None:
    assert parse_cache(text) == expected


def test_polynomials_are_those_of_the_checkpoint() -> None:
    own = {"video": [2.0, 0.0], "audio": [3.0, 1.0, 0.0]}
    made = parse_cache("tea=0.1", own)
    assert made.video_polynomial == (2.0, 0.0) and made.audio_polynomial == (3.0, 1.0, 0.0)
    assert parse_cache("first-block=0.1", own) == parse_cache("first-block=0.1")


def test_description_and_exactness() -> None:
    assert CacheConfig().exact and CacheConfig(kind="tea").exact and parse_cache("attention=1").exact
    assert not parse_cache("attention=1,audio-text=2").exact and not parse_cache("tea=0,audio=0.1").exact
    assert CacheConfig().describe() == {}
    assert parse_cache("first-block=inf,audio=0.1,most=2").describe() == {
        "kind": "first-block", "video": "inf", "audio": 0.1, "most": 2,
    }  # fmt: skip
    assert parse_cache("attention=2,text=3,audio-text=4,low=50").describe() == {
        "kind": "attention", "video": {"temporal": 2, "prior": 2, "text": 3},
        "audio": {"temporal": 2, "prior": 2, "text": 4}, "low": 50.0, "high": 1000.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown cache ''; expected none, first-block=0.1 or"),
        ("deep=0.1", "unknown cache 'deep'"),
        ("first-block", "first-block of a cache must be a number, got ''"),
        ("first-block=-1", r"video threshold of a cache must be from 0 \(off\) to 100, or inf; got -1.0"),
        ("tea=nan", "video threshold .* got nan"),
        ("tea=0.1,most=0", "most of a cache must be a whole number from 1 to 1000, got 0"),
        ("tea=0.1,most=1.5", "most of a cache must be a whole number, got '1.5'"),
        ("tea=0.1,text=2", "'text' is unknown to tea or given twice; expected audio, most"),
        ("tea=0.1,most=2,most=3", "'most' is unknown to tea or given twice"),
        ("attention=1000000", "temporal of a cache must be a whole number from 1 to 1000"),
        ("attention=2,low=900,high=100", "low < high, got 900.0 and 100.0"),
        ("attention=2,high=2000", "from 0 .data. to 1000 .noise."),
    ],
)
def test_unusable_texts(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_cache(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "deep"},
        {"video": True},
        {"audio": float("nan")},
        {"most": 2.0},
        {"video_polynomial": ()},
        {"audio_polynomial": (math.inf,)},
        {"text": None},
    ],
)
def test_unusable_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        CacheConfig(**fields)
