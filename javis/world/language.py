"""The caption grammar: clauses to words and words to clauses.

clause  = article [size] [colour] [material] shape verb ["silently"] [place]
        | "an unseen" [size] [material] "bell rings"
caption = clause ["and" clause]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from javis.errors import UsageError
from javis.world import vocabulary as v

Clause = dict[str, Any]

_SYNONYMS = {
    "an": "a", "the": "a", "one": "a",
    "circle": "ball", "sphere": "ball", "disc": "ball", "cube": "box", "square": "box", "block": "box",
    "big": "large", "huge": "large", "little": "small", "tiny": "small",
    "wood": "wooden", "metallic": "metal", "steel": "metal", "iron": "metal",
    "violet": "purple", "center": "middle", "centre": "middle", "while": "and", "silent": "silently",
    "invisible": "unseen", "hidden": "unseen",
    "bounce": "bounces", "bouncing": "bounces", "swing": "swings", "swinging": "swings", "knock": "knocks",
    "knocking": "knocks", "flash": "flashes", "flashing": "flashes", "float": "floats", "floating": "floats",
    "ring": "rings", "ringing": "rings",
}  # fmt: skip

_KINDS: dict[str, str] = {
    **dict.fromkeys(v.SIZES, "size"),
    **dict.fromkeys(v.COLOURS, "colour"),
    **dict.fromkeys(v.MATERIALS, "material"),
    **dict.fromkeys((*v.SHAPES, v.BELL), "shape"),
    **dict.fromkeys((*v.MOTIONS, v.RINGS), "motion"),
    **dict.fromkeys(v.SIDES, "side"),
}
_FILLERS = frozenset({"a", "on", "in", "at", "is", "to"})
MAX_PROMPT_CHARACTERS = 1000


def clause_text(clause: Mapping[str, Any]) -> str:
    """Words of one clause; attributes that are None are left out."""
    if clause.get("visible") is False:
        words = ["an", "unseen", clause.get("size"), clause.get("material"), v.BELL, v.RINGS]
    else:
        words = ["a", clause.get("size"), clause.get("colour"), clause.get("material"), clause.get("shape")]
        words.append(clause.get("motion"))
        if clause.get("motion") == "floats":
            words.append("silently")
        side = clause.get("side")
        words.append(v.PLACES[side] if side is not None else None)
    return " ".join(word for word in words if word)


def drop_attributes(clause: Mapping[str, Any], drop: float, rng: np.random.Generator) -> Clause:
    """Leave out size, material and place each with probability ``drop``, the colour with half of it."""
    chances = {"size": drop, "material": drop, "side": drop, "colour": 0.5 * drop}
    kept = dict(clause)
    for name, chance in chances.items():
        if rng.random() < chance:
            kept[name] = None
    return kept


def parse_prompt(prompt: str) -> list[Clause]:
    """Read a prompt in the caption grammar.

    Case, punctuation and order of the words are free, "the" and "an" are accepted, and so are a few synonyms ("circle",
    "cube", "big"). Returns one dict for each clause with the keys of ``ATTRIBUTES``: a word of the vocabulary, or None
    where the prompt leaves it open; ``visible`` and ``audible`` are bools.

    Raises:
        UsageError: empty or overlong prompt, unknown words (named, with the known ones), two words for one attribute,
            attributes that contradict each other, or more than two clauses.
    """
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UsageError(f"prompt of {len(prompt)} characters; expected at most {MAX_PROMPT_CHARACTERS}")
    spelled = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", prompt.lower())
    if not spelled:
        raise UsageError('empty prompt; expected words such as "a red ball bounces on the left"')
    words = [_SYNONYMS.get(word, word) for word in spelled]
    known = _FILLERS | _KINDS.keys() | {"and", "unseen", "silently"}
    unknown = list(dict.fromkeys(s for s, word in zip(spelled, words, strict=True) if word not in known))
    if unknown:
        named = ", ".join(repr(word[:40]) for word in unknown[:10]) + (" ..." if len(unknown) > 10 else "")
        raise UsageError(f"unknown word(s) {named}; the built-in world knows: {' '.join(v.VOCABULARY)}")
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "and":
            parts.append([])
        else:
            parts[-1].append(word)
    if len(parts) > 2:
        raise UsageError(f'{len(parts)} clauses joined by "and"; the built-in world shows at most 2 sources')
    return [_parse_clause(part) for part in parts]


def _parse_clause(words: list[str]) -> Clause:
    clause: Clause = dict.fromkeys(v.ATTRIBUTES)
    said = " ".join(words)
    for word in words:
        kind = _KINDS.get(word)
        if kind is None:
            continue
        if clause[kind] not in (None, word):
            raise UsageError(f"two words for the {kind} in {said!r}: {clause[kind]!r} and {word!r}; keep one")
        clause[kind] = word
    bell = clause["shape"] == v.BELL or clause["motion"] == v.RINGS or "unseen" in words
    silent = "silently" in words or clause["motion"] == "floats"
    if bell:
        clause["shape"], clause["motion"] = clause["shape"] or v.BELL, clause["motion"] or v.RINGS
        if clause["shape"] != v.BELL or clause["motion"] != v.RINGS or silent:
            raise UsageError(f'{said!r}: only a bell is unseen, and it rings, as in "an unseen metal bell rings"')
        if clause["colour"] or clause["side"]:
            raise UsageError(f"{said!r}: an unseen bell has no colour and no place; leave them out")
    elif all(clause[name] is None for name in ("size", "colour", "material", "shape", "motion", "side")):
        raise UsageError(f'clause {said!r} names nothing; expected words such as "a red ball bounces on the left"')
    if silent and clause["motion"] not in (None, "floats"):
        raise UsageError(f"{said!r}: only what floats is silent; leave out 'silently' or say 'floats'")
    if silent:
        clause["motion"] = "floats"
    if clause["motion"] in ("flashes", "floats") and clause["material"]:
        sound = "beeps" if clause["motion"] == "flashes" else "is silent"
        raise UsageError(f"{said!r}: what {clause['motion']} {sound}, so it has no material; leave it out")
    clause["visible"], clause["audible"] = not bell, not silent
    return clause


def normalize_prompt(prompt: str) -> str:
    """The prompt in the words and order of the captions; raises what ``parse_prompt`` raises."""
    return " and ".join(clause_text(clause) for clause in parse_prompt(prompt))
