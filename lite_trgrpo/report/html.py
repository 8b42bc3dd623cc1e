"""HTML that cannot forget to escape: whatever `tag` did not make itself goes in as text."""

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lite_trgrpo.text import plain

VOID = {"meta"}


class Html(str):
    """Markup of our own making."""

    __slots__ = ()


def text(value: object) -> Html:
    """A value as text: tags are escaped, control characters and marks that turn the reading direction made visible."""
    return Html(html.escape(plain(str(value))))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. A trailing or inner `_` of an attribute's name is dropped or a `-`: class_, aria_label."""
    found = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    inside = "".join(child if isinstance(child, Html) else text(child) for child in children)
    return Html(f"<{name}{found}>" if name in VOID else f"<{name}{found}>{inside}</{name}>")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> Html:
    """In a frame of its own that scrolls where the screen is narrow."""
    top = tag("tr", *(tag("th", cell) for cell in head))
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", top, *body), class_="wide")


def pairs(facts: Mapping[str, object]) -> Html:
    """Names and values, as many beside each other as there is room for."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()))


def document(title: str, sections: Iterable[Html]) -> str:
    """One file: style sheet in it, no script, and a browser that is told to fetch nothing."""
    style = Html(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    rule = "default-src 'none'; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=rule),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *sections)), lang='en')}\n"
