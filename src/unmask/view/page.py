"""Decodes as data, and the data as one HTML file that loads nothing else."""

from __future__ import annotations

import base64
import html
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unmask.decoding import Decoder
from unmask.decoding.decoder import APPROXIMATE
from unmask.decoding.score import score_each_state
from unmask.decoding.stream import END, MASK
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.io.files import atomic_write
from unmask.models.head import Head
from unmask.models.masked_lm import MaskedLM

LIMIT = 20_000_000  # bytes of a page
ROWS = 128  # at a time: their float32 logits over 126,464 tokens take 65 MB
WHITESPACE_SIGNS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # Unicode's categories
BYTE_OF = {c: b for b, c in bytes_to_unicode().items()}  # the alphabet of byte-level tokenizers


@dataclass(frozen=True)
class Panel:
    """One decode of one row as the page shows it; ``solved`` is None where nobody graded, ``recorded`` where no record is."""

    decoder: Decoder
    trajectory: Trajectory
    candidates: list[tuple[Tensor, Tensor]]
    text: str
    solved: bool | None
    recorded: str | None


@torch.no_grad()
def top_candidates_per_step(lm: MaskedLM, trajectory: Trajectory, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Before each step of a trajectory of one row, the ``count`` likeliest tokens of its masked positions from left to right.

    Yields token ids (M, K) int64, best first, and their probabilities at temperature 1 (M, K) float64. One forward pass a step
    (two with guidance), each of the whole row, also where a cache decoded.
    """

    def likeliest(head: Head, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for h in hidden.split(ROWS):
            logits = torch.cat([piece for _, piece in head.pieces(h)], 1)
            best = logits.topk(min(count, logits.shape[1]))
            total = logits.logsumexp(1, keepdim=True).double()
            found.append((best.indices, (best.values.double() - total).exp()))
        return torch.cat([t for t, _ in found]), torch.cat([p for _, p in found])

    for _, _, (tokens, probs) in score_each_state(lm, trajectory, likeliest, masked=True):
        yield tokens.cpu(), probs.cpu()


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
    return str(lm.tokenizer.convert_ids_to_tokens(token) or f"⟨{token}⟩")


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
    tokens = [t.flatten().cpu() for p in panels for t in (p.trajectory.tokens, *(top for top, _ in p.candidates))]
    ids = torch.cat(tokens).unique()
    return {
        "model": lm.name,
        "weights": lm.weights,
        "prompt": prompt,
        "vocabulary": {"ids": ids.tolist(), "texts": [token_glyph(lm, t) for t in ids.tolist()]},
        "ends": {i: token_name(lm, t) for i, t in enumerate(ids.tolist()) if t in lm.end_ids},
        "wide": len(ids) > 2**16,
        "panels": [_panel_data(lm, panel, ids) for panel in panels],
    }


def _panel_data(lm: MaskedLM, panel: Panel, ids: Tensor) -> dict[str, Any]:
    def base64_of(values: Tensor, kind: str) -> str:
        return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()

    trajectory = panel.trajectory
    step = trajectory.step[0].cpu()
    top, probs = map(torch.cat, zip(*panel.candidates, strict=True))
    return {
        "decoder": panel.decoder.name,
        "cache": panel.decoder.cache in APPROXIMATE,
        "steps": trajectory.steps,
        "nfe": int(trajectory.nfe),
        "text": panel.text,
        "solved": panel.solved,
        "recorded": panel.recorded,
        "step": step.tolist(),
        "logprob": [round(v, 6) for v in trajectory.logprob[0].tolist()],
        "horizon": horizons(lm, panel.decoder, trajectory),
        "candidates": top.shape[1],
        "token": torch.searchsorted(ids, trajectory.tokens[0].cpu()).tolist(),
        "top": base64_of(torch.searchsorted(ids, top), "<u4" if len(ids) > 2**16 else "<u2"),
        "probs": base64_of((probs * 65535).round(), "<u2"),
    }


def horizons(lm: MaskedLM, decoder: Decoder, trajectory: Trajectory) -> list[int]:
    """Before each step of a trajectory of one row: the columns below it were open to commits."""
    plan, counts = decoder.plan, trajectory.step[trajectory.step >= 0].bincount(minlength=trajectory.steps)
    # a model's own blocks are counted from the prompt's first token
    before = 0 if lm.block_length is None else int(trajectory.prompt_mask.sum()) % lm.block_length
    steps = [bisect_right(plan.done, done + before) for done in (counts.cumsum(0) - counts).tolist()]
    return [plan.horizon[s] - before if s < plan.steps else plan.length for s in steps]


def render(data: dict[str, Any]) -> str:
    """The page. Whatever the texts hold, they are in it as JSON without a ``<``."""
    folder = resources.files("unmask.view")
    title = f"{data['model']} · {', '.join(panel['decoder'] for panel in data['panels'])}"
    parts = {
        "title": html.escape("".join(c if c.isprintable() else " " for c in title)),
        "style": (folder / "page.css").read_text("utf-8"),
        "script": "\n".join((folder / name).read_text("utf-8") for name in ("canvas.js", "page.js")),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (folder / "page.html").read_text("utf-8")
    return re.sub("@(title|style|script|data)@", lambda found: parts[found[1]], template)


def page_bytes(lm: MaskedLM, prompt: str, panels: Sequence[Panel], limit: int = LIMIT) -> bytes:
    """The page as a file. Raises UserError where it exceeds ``limit`` bytes."""
    page = render(page_data(lm, prompt, panels)).encode()
    if len(page) > limit:
        size = f"{len(page) / 1e6:.1f} MB, more than {limit / 1e6:g}"
        raise UserError(f"the page would take {size}: choose fewer --candidates, fewer decoders or a shorter canvas")
    return page


def write_page(path: Path, lm: MaskedLM, prompt: str, panels: Sequence[Panel], limit: int = LIMIT) -> int:
    """Write the page, whole or not at all; returns its size in bytes. Raises UserError where that exceeds ``limit``."""
    page = page_bytes(lm, prompt, panels, limit)
    with atomic_write(path) as partial:
        partial.write_bytes(page)
    return len(page)
