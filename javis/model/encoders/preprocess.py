r"""From a prompt to the caption that the official weights were trained on.

The official code appends a score to the prompt and then cleans the result twice, with the rules of DeepFloyd IF's
captions (as ``diffusers`` has them too). Both text encoders get the cleaned caption. The cleaning was made for captions
from web pages and takes some liberties with prose: it lowers the case, drops Chinese characters and what looks like
file names, codes or advertising. ``RULES`` lists the steps in order.
"""

from __future__ import annotations

import html
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass

from javis.errors import UsageError
from javis.model.encoders.tokens import check_captions
from javis.model.parts import library

AESTHETIC_SCORE = 6.5  # what the official sampling configurations ask for
MAX_PROMPT = 10_000  # characters; the encoders read 300 and 77 tokens, and some rules take quadratic time

_FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010\u2011\u2012\u2013\u2014\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

_URL_HINT = r"https?:|www:|\.(?:com|co|ru|net|org|edu|gov|it)"


@dataclass(frozen=True)
class Rule:
    """Replace what matches a pattern."""

    about: str
    pattern: str
    replacement: str
    hint: str = ""  # found in everything that matches; quicker to look for

    def __call__(self, text: str) -> str:
        if self.hint and not re.search(self.hint, text):
            return text
        return re.sub(self.pattern, self.replacement, text)


def fix_text(text: str) -> str:
    """Repair wrongly decoded text (ftfy), resolve html entities twice, strip white space at both ends."""
    fixed: str = library("ftfy").fix_text(text)
    return html.unescape(html.unescape(fixed)).strip()


def collapse_whitespace(text: str) -> str:
    """One blank for every run of white space, none at the ends."""
    return re.sub(r"\s+", " ", text).strip()


def _without_tags(text: str) -> str:
    """Text of a piece of html."""
    # "Looks like a file name or a url" is no news about a caption.
    warnings, bs4 = library("warnings"), library("bs4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content: str = bs4.BeautifulSoup(text, features="html.parser").text
    return content


def _split_long_compounds(text: str) -> str:
    """Blanks for hyphens and underscores where there are more than three: this-is-my-cute-cat."""
    return re.sub("[-_]", " ", text) if len(re.findall("[-_]", text)) > 3 else text


BEFORE_HTML: tuple[tuple[str, ...], ...] = (
    ("<person> of anonymised captions", "<person>", "person"),
    ("urls", rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", "", _URL_HINT),
    ("urls that start with www:", rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", "", _URL_HINT),
)
AFTER_HTML: tuple[tuple[str, ...], ...] = (
    ("@nicknames", r"@\w+\b", ""),
    ("Chinese characters, strokes, hexagrams; Katakana extensions; enclosed letters", "[\u31c0-\u9fff]+", ""),
    ("dashes of all kinds", f"[{re.escape(_DASHES)}]+", "-"),
    ("double quotes of all kinds", "[`´«»“”¨]", '"'),
    ("single quotes of all kinds", "[‘’]", "'"),
    ("&quot;", "&quot;?", ""),
    ("&amp", "&amp", ""),
    ("IP addresses", r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    ("times at the end (numbers of articles)", r"\d:\d\d\s+$", ""),
    ("line ends that were written out", r"\\n", " "),
    ("#1 to #123", r"#\d{1,3}\b", ""),
    ("#12345 and longer", r"#\d{5,}\b", ""),
    ("123456 and longer", r"\b\d{6,}\b", ""),
    # From the start of a word: \S+ alone finds the same, but tries every character of a word that is none.
    ("file names", rf"(?<!\S)\S+\.(?:{_FILE_ENDINGS})", ""),
    ("repeated quotes", "[\"']{2,}", '"'),
    ("repeated full stops", r"\.{2,}", " "),
    ("special characters", r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    ("full stops that stand alone", r"\s+\.\s+", " "),
)
AFTER_FIX: tuple[tuple[str, ...], ...] = (
    ("jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    ("jc6640vc", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    ("6640vc231", r"\b\d+[a-zA-Z]+\d+\b", ""),
    ("shipping", r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    ("downloads", r"(?:free\s)?download(?:\sfree)?", ""),
    ("click for, click on", r"\bclick\b\s(?:for|on)\s\w+", ""),
    ("kinds of files", rf"\b(?:{_FILE_ENDINGS})(?:\simages?)?", ""),
    ("page 12", r"\bpage\s+\d+\b", ""),
    ("j2d1a2a", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("640x480", r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # Latin x, Cyrillic х, ×
    ("blanks before a colon", r"\b\s+:\s+", ": "),
    ("no blank after a comma, full stop or slash", r"(\D[,./])\b", r"\1 "),
    ("runs of white space", r"\s+", " "),
    ("quotes around everything", r"""^["']([\w\W]+)["']$""", r"\1"),
    ("marks at the start", r"^['_,\-:;]", ""),
    ("marks at the end", r"['_,\-:+]$", ""),
    (".only-a-file-ending", r"^\.\S+$", ""),
)

RULES: tuple[Callable[[str], str], ...] = (
    urllib.parse.unquote_plus,
    str.strip,
    str.lower,
    *(Rule(*rule) for rule in BEFORE_HTML),
    _without_tags,
    *(Rule(*rule) for rule in AFTER_HTML),
    _split_long_compounds,
    fix_text,
    *(Rule(*rule) for rule in AFTER_FIX),
    str.strip,
)


def clean_once(caption: str) -> str:
    """One pass of the official cleaning."""
    for rule in RULES:
        caption = rule(caption)
    return caption


def clean_caption(caption: str) -> str:
    """The official cleaning: two passes (what the first one uncovers may be a case for the second)."""
    return clean_once(clean_once(caption))


def prepare_prompt(prompt: str, *, aesthetic_score: float | None = AESTHETIC_SCORE) -> str:
    """Prompt -> the caption for both text encoders, as the official sampling script makes it.

    Args:
        prompt: any text of at most 10,000 characters, the empty one too.
        aesthetic_score: appended as "aesthetic score: 6.5." unless the prompt names one; None: nothing is appended.

    Raises:
        UsageError: the prompt is too long or not valid text; ``ftfy`` or ``beautifulsoup4`` is not installed.
    """
    check_captions([prompt])
    if len(prompt) > MAX_PROMPT:
        raise UsageError(f"the prompt has {len(prompt)} characters, at most {MAX_PROMPT} are read; shorten it")
    if aesthetic_score is not None and "aesthetic score:" not in prompt:
        prompt = f"{prompt} aesthetic score: {aesthetic_score:.1f}."
    return clean_caption(prompt)
