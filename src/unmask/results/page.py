"""One HTML file that asks for nothing outside itself."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from PIL import Image

from unmask.errors import UserError
from unmask.results.collect import Folder
from unmask.results.style import GRID, INK, PAPER, SOFT, Picture
from unmask.results.tables import Table

LIMIT = 5_000_000
"""Bytes that a page may have."""
HEAVY = 400_000
"""Bytes of SVG above which a figure is shown as PNG: browsers draw thousands of shapes slowly."""
_LIGHT = {"ink": INK, "soft": SOFT, "grid": GRID, "paper": PAPER}
_DARK = {"ink": "#e6e8eb", "soft": "#9aa3ae", "grid": "#343a42", "paper": "#15181c"}


@dataclass(frozen=True)
class Section:
    """A part of the page; ``name`` is its anchor."""

    name: str
    title: str
    says: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class _Shown:
    caption: str
    width: int
    height: int
    source: str


def colors(theme: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in theme.items())


def _svg(picture: Picture) -> str:
    """The SVG as a data: URI, in the page's colors, light or dark as the reader's are."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", picture.svg[picture.svg.index("<svg") :], flags=re.DOTALL)
    for name, value in _LIGHT.items():
        svg = svg.replace(value, f"var(--{name})")
    theme = f"svg{{{colors(_LIGHT)}}}@media(prefers-color-scheme:dark){{svg{{{colors(_DARK)}}}}}"
    return _uri("svg+xml", re.sub(r"(<svg[^>]*>)", rf"\1<style>{theme}</style>", svg, count=1).encode())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _half(png: bytes) -> bytes:
    """At half the size, in 64 colors."""
    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").reduce(2).quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def _shown(picture: Picture, form: int) -> _Shown:
    """A picture as SVG (form 0), PNG (1) or small PNG (2), at its size in CSS pixels."""
    width, height = (round(v * 96 / 150) for v in Image.open(io.BytesIO(picture.png)).size)
    if form == 0:
        return _Shown(picture.caption, width, height, _svg(picture))
    return _Shown(picture.caption, width, height, _uri("png", picture.png if form == 1 else _half(picture.png)))


def render(folders: Sequence[Folder], sections: Sequence[Section]) -> str:
    """The page; figures are SVG where they are light, else PNG, and smaller PNG where the page would be too large.

    Raises:
        UserError: where the page would have more than LIMIT bytes even so.
    """
    pictures = [p for section in sections for p in section.pictures]
    forms = {p.stem: int(len(p.svg) > HEAVY) for p in pictures}
    shown = {p.stem: _shown(p, forms[p.stem]) for p in pictures}
    rest = len(_fill(folders, sections, {p.stem: _Shown(p.caption, 0, 0, "") for p in pictures}).encode()) + 100 * len(
        pictures
    )
    while (size := rest + sum(len(s.source) for s in shown.values())) >= LIMIT:
        reducible = [p for p in pictures if forms[p.stem] < 2]
        if not reducible:
            raise UserError(
                f"the report would be a page of {size / 1e6:.1f} MB, more than {LIMIT / 1e6:g}: give fewer folders at a time"
            )
        largest = max(reducible, key=lambda p: len(shown[p.stem].source))
        forms[largest.stem] += 1
        shown[largest.stem] = _shown(largest, forms[largest.stem])
    return _fill(folders, sections, shown)


def _fill(folders: Sequence[Folder], sections: Sequence[Section], shown: dict[str, _Shown]) -> str:
    here = files("unmask.results")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = _pretty
    theme = f":root{{{colors(_LIGHT)}}}\n@media (prefers-color-scheme: dark) {{ :root{{{colors(_DARK)}}} }}\n"
    return environment.from_string((here / "page.html").read_text(encoding="utf-8")).render(
        folders=folders,
        sections=sections,
        shown=shown,
        style=theme + (here / "page.css").read_text(encoding="utf-8"),
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
