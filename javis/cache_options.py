"""Caches across denoising steps: which there are, their thresholds, how they are written. Loads no torch.

What they do: javis/sample/cache.py and docs/sampling.md. None is exact, so none is on unless it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from javis.errors import UsageError

CacheKind = Literal["first-block", "tea", "attention"]
KINDS: tuple[str, ...] = get_args(CacheKind)
ATTENTIONS = ("temporal", "prior", "text")
MAX_THRESHOLD, MAX_STEPS = 100.0, 1000
EXAMPLES = "first-block=0.1 or tea=0.1,audio=0.05,most=3 or attention=2,text=4,low=100,high=900"
# Keys that may follow KIND=VALUE in the text form.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "first-block": ("audio", "most"),
    "tea": ("audio", "most"),
    "attention": (*ATTENTIONS, *(f"audio-{name}" for name in ATTENTIONS), "low", "high"),
}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What is re-used from one evaluation of the model to the next. The default re-uses nothing.

    Attributes:
        kind: "first-block", "tea" or "attention"; None: no cache.
        video, audio: thresholds of "first-block" and "tea" for the relative change since a stream's layers were last
            computed; a stream below its own re-uses what they added then. 0: never; infinity: always.
        most: re-uses in a row at most; None: any number.
        video_polynomial, audio_polynomial: of "tea", highest power first: relative change of the first layer's input ->
            relative change of what the layers add (:mod:`benchmarks.caches` fits them). The default is the identity.
        temporal, prior, text: of "attention": outputs of temporal self-attention, of the prior's and of the caption's
            cross-attention are computed in every n-th evaluation; 1: in every one.
        audio_temporal, audio_prior, audio_text: the same of the audio stream; None: as the video's.
        low, high: timesteps, 0 (data) to 1000 (noise), between which "attention" re-uses anything.

    Raises:
        UsageError: a value out of range.
    """

    kind: CacheKind | None = None
    video: float = 0.0
    audio: float = 0.0
    most: int | None = None
    video_polynomial: tuple[float, ...] = (1.0, 0.0)
    audio_polynomial: tuple[float, ...] = (1.0, 0.0)
    temporal: int = 1
    prior: int = 1
    text: int = 1
    audio_temporal: int | None = None
    audio_prior: int | None = None
    audio_text: int | None = None
    low: float = 0.0
    high: float = 1000.0

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise UsageError(f"unknown cache {self.kind!r}; expected one of {', '.join(KINDS)}")
        for name in ("video", "audio"):
            value = getattr(self, name)
            if not (_is_number(value) and (0 <= value <= MAX_THRESHOLD or value == math.inf)):
                raise UsageError(
                    f"the {name} threshold of a cache must be from 0 (off) to {MAX_THRESHOLD:g}, or inf; got {value!r}"
                )
        for name in ("most", *ATTENTIONS, *(f"audio_{attention}" for attention in ATTENTIONS)):
            value = getattr(self, name)
            optional = name == "most" or name.startswith("audio_")
            if not (optional and value is None) and not (_is_whole(value) and 1 <= value <= MAX_STEPS):
                raise UsageError(f"{name} of a cache must be a whole number from 1 to {MAX_STEPS}, got {value!r}")
        if not (_is_number(self.low) and _is_number(self.high) and 0 <= self.low < self.high <= 1000):
            raise UsageError(
                f"low and high of a cache must be timesteps from 0 (data) to 1000 (noise) with low < high, got "
                f"{self.low!r} and {self.high!r}"
            )
        for name in ("video_polynomial", "audio_polynomial"):
            powers = tuple(getattr(self, name))
            if not powers or not all(_is_number(power) and math.isfinite(power) for power in powers):
                raise UsageError(f"{name} of a cache must be finite numbers, highest power first, got {powers!r}")
            object.__setattr__(self, name, powers)

    @property
    def exact(self) -> bool:
        """Whether nothing is ever re-used."""
        if self.kind == "attention":
            return all(every == 1 for stream in ("video", "audio") for every in self.every(stream).values())
        return self.kind is None or (self.video == 0 and self.audio == 0)

    def every(self, stream: str) -> dict[str, int]:
        """Of the attentions of a stream: in which evaluation out of how many each is computed."""
        if stream == "video":
            return {name: getattr(self, name) for name in ATTENTIONS}
        own = {name: getattr(self, f"audio_{name}") for name in ATTENTIONS}
        return {name: getattr(self, name) if every is None else every for name, every in own.items()}

    def describe(self) -> dict[str, Any]:
        """Kind and settings as json values, for the json of a clip."""
        if self.kind is None:
            return {}
        if self.kind == "attention":
            return {
                "kind": self.kind, "video": self.every("video"), "audio": self.every("audio"),
                "low": self.low, "high": self.high,
            }  # fmt: skip
        facts: dict[str, Any] = {"kind": self.kind, "video": _json(self.video), "audio": _json(self.audio)}
        if self.most is not None:
            facts["most"] = self.most
        if self.kind == "tea":
            facts |= {
                "video_polynomial": list(self.video_polynomial),
                "audio_polynomial": list(self.audio_polynomial),
            }
        return facts


def parse_cache(text: str, polynomials: Mapping[str, Any] | None = None) -> CacheConfig:
    """``KIND=VALUE[,KEY=VALUE...]`` -> configuration; "none" is no cache.

    Args:
        text: ``first-block=0.1`` (threshold of both streams), ``tea=0.1,audio=0.05,most=3``, ``attention=2,text=4``
            (all attentions every 2nd evaluation, those to captions every 4th).
        polynomials: of "tea", a checkpoint's own: {"video": [...], "audio": [...]}.

    Raises:
        UsageError: text that says no cache, or a value out of range.
    """
    if not isinstance(text, str):
        raise UsageError(f"a cache must be a text such as {EXAMPLES}, got {text!r}")
    if text.strip() == "none":
        return CacheConfig()
    pairs = [tuple(part.strip() for part in item.partition("=")[::2]) for item in text.split(",")]
    kind, value = pairs[0]
    if kind not in KINDS:
        raise UsageError(f"unknown cache {kind[:40]!r}; expected none, {EXAMPLES}")
    fields: dict[str, Any] = {"kind": kind}
    if kind == "attention":
        fields |= dict.fromkeys(ATTENTIONS, _whole(kind, value))
    else:
        fields |= dict.fromkeys(("video", "audio"), _number(kind, value))
    seen = set()
    for key, value in pairs[1:]:
        if key not in _KEYS[kind] or key in seen:
            raise UsageError(
                f"cache {text[:60]!r}: {key!r} is unknown to {kind} or given twice; expected {', '.join(_KEYS[kind])}"
            )
        seen.add(key)
        number = key in ("low", "high") or (key == "audio" and kind != "attention")
        fields[key.replace("-", "_")] = _number(key, value) if number else _whole(key, value)
    if kind == "tea" and polynomials:
        fields |= {f"{stream}_polynomial": tuple(values) for stream, values in polynomials.items()}
    return CacheConfig(**fields)


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{key} of a cache must be a number, got {text[:40]!r}; expected {EXAMPLES}") from None


def _whole(key: str, text: str) -> int:
    if not text.isdecimal() or not text.isascii():
        raise UsageError(f"{key} of a cache must be a whole number, got {text[:40]!r}; expected {EXAMPLES}")
    return int(text[:9])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


__all__ = ["CacheConfig", "CacheKind", "parse_cache"]
