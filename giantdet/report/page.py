"""HTML from texts: everything that is not `Html` is escaped, so names of classes and files stay text."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))


class Html(str):
    """A text that is HTML already."""


class Section(NamedTuple):
    """A part of the page; `name` is its anchor."""

    name: str
    title: str
    link: str
    """A short title, for the navigation."""
    content: Html


def escaped(text: object) -> Html:
    """Return a text, or anything that has one, as HTML."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def joined(parts: Iterable[object]) -> Html:
    """Return parts one after the other."""
    return Html("".join(map(escaped, parts)))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """Return an element; of its attributes `class_` is written `class`, and `_` in names is a hyphen."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{joined(content)}</{name}>")


def paragraph(*content: object) -> Html:
    """Return a paragraph of text."""
    return tag("p", *content)


def code(text: object) -> Html:
    """Return a name, path or command as such."""
    return tag("code", text)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], words: int = 1) -> Html:
    """Return a table; its first `words` columns are texts, the others are numbers. Wide ones scroll."""

    def row(cell: str, values: Sequence[object]) -> Html:
        return tag(
            "tr", *(tag(cell, v, class_=None if n < words else "number") for n, v in enumerate(values))
        )

    body = joined(row("td", values) for values in rows)
    return tag(
        "div", tag("table", tag("thead", row("th", head)), tag("tbody", body)), class_="scroll", tabindex="0"
    )


def chart(svg: str, title: str, note: object = "", scrolls: bool = False, wide: bool = False) -> Html:
    """Return a drawing of `figures.py` with its title, and what to look for in it.

    One that scrolls keeps its size on a narrow screen; a wide one has no chart beside it.
    """
    caption = tag("figcaption", tag("b", title), Html(" ") if note else "", note)
    drawing = tag("div", Html(svg), class_="scroll" if scrolls else "drawing")
    return tag("figure", caption, drawing, class_="chart wide" if wide else "chart")


def photos(photos: Sequence[tuple[bytes, tuple[int, int]]], caption: str) -> Html:
    """Return JPEG files beside each other with a caption; with each, its width and height in pixels."""
    images = []
    for jpeg, (width, height) in photos:
        source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
        alt = html.escape(caption)
        images.append(f'<img src="{source}" alt="{alt}" loading="lazy" width="{width}" height="{height}">')
    row = tag("div", Html("".join(images)), class_="pair" if len(images) > 1 else None)
    return tag("figure", row, tag("figcaption", caption), class_="photo")


def grid(parts: Iterable[Html], kind: str = "charts") -> Html:
    """Return parts beside each other, or below each other on a narrow screen."""
    return tag("div", *parts, class_=kind)


def folded(title: object, *content: object) -> Html:
    """Return content that is shown after a click on its title."""
    return tag("details", tag("summary", title), *content)


def number(value: float | None, digits: int = 3) -> str:
    """Return a score as text; a dash where there is nothing to score."""
    return "–" if value is None or value != value or value < 0 else f"{value:.{digits}f}"


def page(title: str, head: Html, sections: Sequence[Section], left_out: Sequence[tuple[str, str]]) -> str:
    """Return the whole page; `left_out` are titles of sections that do not apply, and why."""
    links = [tag("a", section.link, href=f"#{section.name}") for section in sections]
    parts = [
        tag("section", tag("h2", section.title), section.content, id=section.name) for section in sections
    ]
    if left_out:
        reasons = [tag("li", tag("b", name), f": {why}") for name, why in left_out]
        parts.append(
            tag("section", tag("h2", "Not on this page"), tag("ul", *reasons), id="left-out", class_="plain")
        )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n"
        f"<header>{head}</header>\n<nav>{joined(links)}</nav>\n<main>\n"
        + "\n".join(parts)
        + f'\n</main>\n<dialog id="zoom"><img alt=""></dialog>\n<script>\n{SCRIPT.read_text()}</script>\n'
        "</body>\n</html>\n"
    )
