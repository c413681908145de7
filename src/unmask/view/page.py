"""Decodes as data, and the data as one HTML file that loads nothing else."""

from __future__ import annotations

import base64
import html
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unmask.decoding import Decoder
from unmask.decoding.stream import END, MASK
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.io.files import atomic_write
from unmask.models.masked_lm import MaskedLM

LIMIT = 20_000_000  # bytes of a page
WHITESPACE_SIGNS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # Unicode's categories
BYTE_OF = {c: b for b, c in bytes_to_unicode().items()}  # the alphabet of byte-level tokenizers


@dataclass(frozen=True)
class Panel:
    """One decode as the page shows it.

    Attributes:
        trajectory: of one row. candidates: before each step, the likeliest tokens of the masked positions (M, K) int64 and
            their probabilities (M, K), as ``top_candidates_per_step`` yields them.
        solved: None where nobody graded. recorded: the completion of the record that this decode repeats.
    """

    decoder: Decoder
    trajectory: Trajectory
    candidates: list[tuple[Tensor, Tensor]]
    text: str
    solved: bool | None
    recorded: str | None


def visible(text: str) -> str:
    """A token's text with every character to be seen: ␣ ⏎ ⇥ ␀, ⟨200B⟩ for what has no glyph, ◌ under a combining mark."""

    def glyph(c: str) -> str:
        if c in WHITESPACE_SIGNS or c < " ":
            return WHITESPACE_SIGNS.get(c) or chr(0x2400 + ord(c))
        return f"⟨{ord(c):X}⟩" if unicodedata.category(c) in INVISIBLE else c

    shown = "".join(map(glyph, text))
    return "◌" + shown if shown and unicodedata.category(shown[0]).startswith("M") else shown


def token_name(lm: MaskedLM, token: int) -> str:
    """The tokenizer's name for a token; ⟨id⟩ where it has none."""
    piece = lm.tokenizer.convert_ids_to_tokens(token)
    return f"⟨{token}⟩" if piece is None else str(piece)


def token_glyph(lm: MaskedLM, token: int) -> str:
    """How a token is shown. Of half a character the bytes: ⟨E2 82⟩."""
    if token == lm.mask_id:
        return MASK
    if token in lm.end_ids:
        return END
    text, piece = str(lm.tokenizer.decode([token])), token_name(lm, token)
    if "\ufffd" in text:
        if single := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return f"⟨{single[1]}⟩"
        if all(c in BYTE_OF for c in piece):
            return "⟨" + " ".join(f"{BYTE_OF[c]:02X}" for c in piece) + "⟩"
    return visible(text or piece)


def page_data(lm: MaskedLM, prompt: str, panels: Sequence[Panel]) -> dict[str, Any]:
    """What the page's script reads.

    A token's number is its place in ``vocabulary``; ``ends`` names those that end a text. ``top`` (such numbers) and ``probs``
    (probabilities times 65535) are base64 of little-endian integers: of each step and masked cell, from left to right, K.
    """
    shown = [panel.trajectory.tokens[0].cpu() for panel in panels]
    kept = [tuple(map(torch.cat, zip(*panel.candidates, strict=True))) for panel in panels]
    ids = torch.cat([*shown, *(top.flatten() for top, _ in kept)]).unique()
    wide = len(ids) > 2**16
    return {
        "model": lm.name,
        "weights": lm.weights,
        "prompt": prompt,
        "vocabulary": {"ids": ids.tolist(), "texts": [token_glyph(lm, t) for t in ids.tolist()]},
        "ends": {i: token_name(lm, t) for i, t in enumerate(ids.tolist()) if t in lm.end_ids},
        "wide": wide,
        "panels": [
            {
                **_facts(panel),
                "token": torch.searchsorted(ids, tokens).tolist(),
                "top": _base64(torch.searchsorted(ids, top), "<u4" if wide else "<u2"),
                "probs": _base64((probs * 65535).round(), "<u2"),
            }
            for panel, tokens, (top, probs) in zip(panels, shown, kept, strict=True)
        ],
    }


def _facts(panel: Panel) -> dict[str, Any]:
    """What the page shows of a decode besides tokens."""
    trajectory, plan = panel.trajectory, panel.decoder.plan
    step = trajectory.step[0].cpu()
    done = [int(((step >= 0) & (step < s)).sum()) for s in range(trajectory.steps)]
    return {
        "decoder": panel.decoder.name,
        "cache": panel.decoder.cache != "none",
        "steps": trajectory.steps,
        "nfe": int(trajectory.nfe),
        "text": panel.text,
        "solved": panel.solved,
        "recorded": panel.recorded,
        "step": step.tolist(),
        "logprob": [round(v, 6) for v in trajectory.logprob[0].tolist()],
        "horizon": [plan.horizon[bisect_right(plan.done, d)] for d in done],
        "candidates": panel.candidates[0][0].shape[1],
    }


def _base64(values: Tensor, kind: str) -> str:
    return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()


def render(data: dict[str, Any]) -> str:
    """The page. Whatever the texts hold, they stand in it as JSON without a ``<``."""
    folder = resources.files("unmask.view")
    title = f"{data['model']} · {', '.join(panel['decoder'] for panel in data['panels'])}"
    parts = {
        "title": html.escape("".join(c if c.isprintable() else " " for c in title)),
        "style": (folder / "page.css").read_text("utf-8"),
        "script": (folder / "page.js").read_text("utf-8"),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (folder / "page.html").read_text("utf-8")
    return re.sub("@(title|style|script|data)@", lambda found: parts[found[1]], template)


def write_page(path: Path, lm: MaskedLM, prompt: str, panels: Sequence[Panel], limit: int = LIMIT) -> int:
    """Write the page, whole or not at all; returns its size in bytes. Raises UserError where that exceeds ``limit``."""
    page = render(page_data(lm, prompt, panels)).encode()
    if len(page) > limit:
        size = f"{len(page) / 1e6:.1f} MB, more than {limit / 1e6:g}"
        raise UserError(f"the page would take {size}: choose fewer --candidates, fewer decoders or a shorter canvas")
    with atomic_write(path) as partial:
        partial.write_bytes(page)
    return len(page)
