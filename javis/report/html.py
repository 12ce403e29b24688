"""HTML as text in which everything is escaped unless it was made here.

A page is built with `tag`, whose children and attributes are plain text, escaped, or `Markup` that `tag` made. The page
carries a content security policy that allows its own style and script by their hashes and nothing else: no network, and
no script that a caption brought along.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence

VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "source", "line", "path", "rect", "circle", "polyline"})
# What no HTML document may hold: control characters but tab and line ends, surrogates, non-characters.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is HTML already. Made by the functions of this module, never from what was read from a file."""

    __slots__ = ()


Content = str | int | float | None | Iterable["Content"]


def escaped(text: object) -> Markup:
    """``text`` for any place in the page: angle brackets, quotes and ampersands as entities, unfit characters as �."""
    return Markup(html.escape(_UNFIT.sub("�", str(text)), quote=True))


def join(content: Content) -> Markup:
    """Content in one piece: None is nothing, numbers and text are escaped."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, (str, int, float)):
        return escaped(content)
    return Markup("".join(join(part) for part in content))


def tag(name: str, /, *children: Content, **attributes: str | int | float | bool | None) -> Markup:
    """An element: ``tag("td", "a < b", class_="number")``.

    Underscores in names of attributes become dashes (a last one is dropped); True is an attribute without a value, None
    and False leave it out.
    """
    told = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        if label == "viewbox":
            label = "viewBox"
        told.append(f" {label}" if value is True else f' {label}="{escaped(value)}"')
    start = f"<{name}{''.join(told)}"
    return Markup(f"{start}/>" if name in VOID else f"{start}>{join(children)}</{name}>")


def table(
    header: Sequence[Content],
    rows: Iterable[Sequence[Content]],
    *,
    caption: str,
    text: Iterable[int] = (0,),
    titled: bool = False,
) -> Markup:
    """A table that scrolls within itself on a narrow screen; the first cell of a row is its header.

    Args:
        header: names of the columns; empty: none are shown.
        rows: cells.
        caption: what the table is, for people who do not see it and above it for those who do.
        text: columns of words, which are set flush left; all others are numbers.
        titled: a heading above says the same already; the caption is then for those who do not see the table.
    """
    words = set(text)

    def kind(index: int) -> str | None:
        return "words" if index in words else None

    head = tag("tr", [tag("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(header)])
    body = []
    for row in rows:
        cells = [
            tag("th", cell, scope="row", class_=kind(i)) if i == 0 else tag("td", cell, class_=kind(i))
            for i, cell in enumerate(row)
        ]
        body.append(tag("tr", cells))
    inner = tag(
        "table",
        tag("caption", caption, class_="unseen" if titled else None),
        tag("thead", head) if header else None,
        tag("tbody", body),
    )
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def details(summary: str, *content: Content, open_: bool = False) -> Markup:
    """Content that is folded away."""
    return tag("details", tag("summary", summary), *content, open_=open_)


def section(title: str, *content: Content, id_: str) -> Markup:
    """A part of the page with a heading."""
    return tag("section", tag("h2", title, id_=id_), *content, aria_labelledby=id_)


def document(title: str, body: Content, *, style: str, script: str) -> str:
    """The whole page. ``style`` and ``script`` are this package's own, and must not hold ``</``."""
    if "</" in style or "</" in script:
        raise ValueError("style or script would end its element")
    policy = (
        "default-src 'none'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body, tag('script', Markup(script))), lang='en')}\n"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
