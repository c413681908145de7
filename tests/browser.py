"""Pages in a headless Chromium: what a reader would see, do and be asked for. A test is skipped where there is no browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import html5lib
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def data_of(page: str) -> dict[str, Any]:
    """The JSON that a page carries in ``<script id="data">``, if it is valid HTML5 and asks for no other file."""
    root = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    assert not [e for e in root.iter() if e.get("src") or not (e.get("href") or "#").startswith(("#", "data:"))]
    data, script = root.iter("script")
    assert data.get("id") == "data" and data.get("type") == "application/json" and "use strict" in (script.text or "")
    return json.loads(data.text or "")


@contextmanager
def open_page(
    place: Path | str,
    width: int = 1200,
    height: int = 900,
    *,
    fragment: str = "",
    colors: Literal["light", "dark"] = "light",
    touch: bool = False,
) -> Iterator[tuple[Any, list[str]]]:
    """A local HTML file, or the page at an address, in a window of ``width`` x ``height`` CSS pixels.

    Args:
        fragment: what follows ``#``. colors: the reader's scheme. touch: a touch screen instead of a mouse.

    Yields:
        The page (playwright's) and a list of problems, which fills with uncaught errors, what the console calls an error or a
        warning, and every request but the one for the file itself, or those to the address's own origin (they are refused).
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    problems: list[str] = []
    address = place if isinstance(place, str) else place.resolve().as_uri()

    def allowed(url: str) -> bool:
        if isinstance(place, Path):
            return url.split("#")[0] == address
        return urlsplit(url)[:2] == urlsplit(address)[:2]

    def pass_on(route: Any) -> None:
        if allowed(route.request.url):
            route.continue_()
        else:
            problems.append(f"request: {route.request.url}")
            route.abort()

    def say(message: Any) -> None:
        if message.type in ("error", "warning"):
            problems.append(f"console: {message.text}")

    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=program, args=FLAGS)
        try:
            view = {"viewport": {"width": width, "height": height}, "color_scheme": colors, "has_touch": touch}
            page = browser.new_page(**view, reduced_motion="reduce")
            page.set_default_timeout(10_000)
            page.on("pageerror", lambda error: problems.append(f"error: {error}"))
            page.on("console", say)
            page.route("**/*", pass_on)
            page.goto(address + (f"#{fragment}" if fragment else ""))
            yield page, problems
        finally:
            browser.close()
