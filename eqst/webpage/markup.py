"""HTML as nested calls: everything that is not HTML already is escaped."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_VOID = {"br", "img", "input", "link", "meta"}


class Html(str):
    """Text that is HTML."""


def text(content: Any) -> Html:
    """Escaped, fit for attributes too; HTML stays as it is, None is nothing, a list its parts."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str) or not isinstance(content, Iterable):
        return Html(html.escape(str(content), quote=True))
    return Html("".join(text(part) for part in content))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element: `tag("p", "a < b", cls="note", aria_label="..")`.

    Underscores in attributes' names become hyphens and `cls` is class; True is an attribute
    without a value, False and None are none.
    """
    words = [name]
    for key, value in attributes.items():
        key = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(str(value), quote=True)}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if name in _VOID else f"{opened}{text(children)}</{name}>")


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    first: int = 1,
    marked: Iterable[int] = (),
) -> Html:
    """A table in a box that scrolls sideways by itself, reached by keyboard.

    Args:
      caption: what it shows; also the box's name.
      head: of the columns.
      rows: cells; the first column is a heading of its row.
      first: columns of text, set to the left; the others are numbers.
      marked: numbers of the rows to be set apart.
    """
    marked = set(marked)
    lines = [
        tag(
            "tr",
            [
                tag("th", cell, scope="row") if i == 0 else tag("td", cell, cls=_kind(i, first))
                for i, cell in enumerate(row)
            ],
            cls="marked" if number in marked else None,
        )
        for number, row in enumerate(rows)
    ]
    headings = [tag("th", cell, scope="col", cls=_kind(i, first)) for i, cell in enumerate(head)]
    inside = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", headings)),
        tag("tbody", lines),
    )
    return tag("div", inside, cls="scroll", tabindex="0", role="region", aria_label=caption)


def _kind(column: int, first: int) -> str | None:
    return None if column < first else "number"


def details(summary: Any, *content: Any, cls: str | None = None) -> Html:
    """What is folded away until asked for."""
    return tag("details", tag("summary", summary), content, cls=cls)


def figure(picture: Any, caption: Any, data: Html | None = None, **attributes: Any) -> Html:
    """A picture, its caption, and its numbers as a folded table."""
    return tag(
        "figure",
        picture,
        tag("figcaption", caption),
        None if data is None else details("Numbers", data),
        **attributes,
    )


def section(name: str, title: str, *content: Any, level: int = 2) -> Html:
    """A part of the page with a heading that can be linked to."""
    heading = tag(f"h{level}", tag("a", title, href=f"#{name}"), id=f"{name}-title")
    return tag("section", heading, content, id=name, aria_labelledby=f"{name}-title")


def data(name: str, content: Any) -> Html:
    """JSON for the script, in the page itself; nothing in it can end the element."""
    inside = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        inside = inside.replace(sign, f"\\u{ord(sign):04x}")
    return tag("script", Html(inside), type="application/json", id=name)


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, a true minus before what is below 0."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def anchor(words: str) -> str:
    """A name fit for an id: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "x"


def missing(sentence: str) -> Html:
    """What stands in a section whose material was not given."""
    return tag("p", sentence, cls="missing")
