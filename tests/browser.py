"""A page in headless Chromium, and pages without their charts. No test in here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import sync_playwright

PHONE, DESKTOP = 390, 1280
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
_MORE = ("--disable-sync", "--no-first-run")


class Seen(NamedTuple):
    """What a reader, and the console, see of a page."""

    sections: list[str]  # their ids
    links: list[str]  # of the navigation
    text: str
    title: str
    scripts: int  # elements
    broken_images: int
    overflowing: list[str]  # elements that are wider than the window, outside of what scrolls
    background: str
    complaints: list[str]  # console, errors, dialogs, failed requests
    requests: list[str]  # without data:


_LOOK = """() => ({
    sections: [...document.querySelectorAll("section")].map(e => e.id),
    links: [...document.querySelectorAll("nav a")].map(e => e.getAttribute("href")),
    text: document.body.innerText,
    title: document.title,
    scripts: document.scripts.length,
    broken_images: [...document.querySelectorAll(".photo img")].filter(e => !e.naturalWidth).length,
    overflowing: [document.documentElement, ...document.querySelectorAll("body *")]
        .filter(e => !e.closest(".scroll, nav, pre, dialog, script, svg"))
        .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.scrollWidth > innerWidth)
        .map(e => e.tagName + "." + e.className),
    background: getComputedStyle(document.body).backgroundColor,
})"""


def look(page: Path, width: int = DESKTOP, scheme: str = "light") -> Seen:
    """Open a file at a width in pixels, in a "light" or "dark" colour scheme. Skips without Chromium."""
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium, or CHROMIUM=PATH")
    complaints: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*_QUIET, *_MORE])
        try:
            context = browser.new_context(
                viewport={"width": width, "height": 844},
                color_scheme=scheme,  # type: ignore[arg-type]
            )
            tab = context.new_page()
            tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
            tab.on("pageerror", lambda error: complaints.append(f"error: {error}"))
            tab.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:200]}"))
            tab.on("request", lambda request: requests.append(request.url[:200]))

            def dismiss(dialog: Any) -> None:
                complaints.append(f"dialog: {dialog.message}")
                dialog.dismiss()

            tab.on("dialog", dismiss)
            tab.goto(page.absolute().as_uri())
            for image in tab.query_selector_all(".photo img"):
                image.scroll_into_view_if_needed()  # they are loaded when they come into view
            found = tab.evaluate(_LOOK)
        finally:
            browser.close()
    own = [url for url in requests if not url.startswith("data:")]
    return Seen(**found, complaints=complaints, requests=own)


def blank_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing of charts: they are empty SVG elements, and there are no PNG files."""

    def blank(_: object, file: Any, **__: object) -> None:
        if not isinstance(file, Path):
            file.write("<svg></svg>")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", blank)
