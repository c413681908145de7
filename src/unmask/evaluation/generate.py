"""``unmask generate``: one prompt before your eyes, or many from a file into a file. Read without torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from unmask.config import read_flags
from unmask.errors import UserError, check_at_least
from unmask.evaluation.progress import progress_bars
from unmask.io.files import each_line, writing_to
from unmask.io.store import RecordStore, as_lines
from unmask.io.terminal import console
from unmask.models.source import ModelSource

if TYPE_CHECKING:
    from unmask.models.masked_lm import MaskedLM

_FIX = 'write one JSON object a line: {"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}]}'


@dataclass(kw_only=True)
class GenerateArguments(ModelSource):
    """Complete prompts, or fill a template's gaps (``<|mask:8|>``: eight tokens); a terminal shows the canvas fill."""

    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """The user's turn, or a template; ``-`` reads it from standard input."""
    input: str | None = None
    """JSON lines instead of one prompt (``-``: from standard input), each with ``prompt`` or ``messages``; other keys stay."""
    output: str | None = None
    """File of JSON lines, one a completion; the same command again continues it."""
    json: bool = False
    """Print JSON lines instead of texts."""
    decoder: str | None = None
    """Decoder spec, e.g. ``eoser-ass:blocks=4,temperature=0.7``, or a YAML file; ``none``: semi-ar, for templates full."""
    max_new_tokens: int = 128
    """Canvas length in tokens, unless a template sets it."""
    num_return_sequences: int = 1
    """Completions a prompt; more than one need a decoder that draws random numbers."""
    stop: list[str] = field(default_factory=list)
    """Strings at the first of which a text ends."""
    prefill: str = ""
    """Text that the assistant's turn starts with; it may have gaps."""
    seed: int = 0
    """Completion i draws from seed + i."""
    batch_size: int = 32
    """Rows of one forward pass."""
    delay: float = 0.0
    """Seconds to wait after each step, for watching."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**62 or not 0 <= self.delay < 60:
            hint = "choose a seed of 0 or more, a delay below 60 s"
            raise UserError(f"seed is {self.seed}, delay is {self.delay}: {hint}")
        check_at_least(self, 1, "num_return_sequences", "batch_size")
        if (self.prompt is None) == (self.input is None):
            raise UserError("pass one of a prompt and --input with a file of them")

    def options(self) -> dict[str, Any]:
        """What ``lm.generate`` takes as it is."""
        names = ("max_new_tokens", "num_return_sequences", "stop", "prefill", "batch_size")
        return {name: getattr(self, name) for name in names}

    def prompts(self) -> list[dict[str, Any]]:
        """The lines of the input, or one that holds the prompt."""
        if self.input is None:
            return [{"prompt": sys.stdin.read() if self.prompt == "-" else self.prompt}]
        schema = {"prompt?": str, "messages?": [{"role": str, "content": str}]}
        path = Path("/dev/stdin" if self.input == "-" else self.input)
        rows = list(each_line(path, schema, _FIX, _check_prompt, own=False))
        if not rows:
            raise UserError(f"{self.input} holds no prompts: {_FIX}")
        return rows


def _check_prompt(row: dict[str, Any]) -> dict[str, Any]:
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("it needs one of prompt and messages")
    return row


def command(arguments: list[str]) -> None:
    """``unmask generate``."""
    run(read_flags(GenerateArguments, arguments, prog="unmask generate"))


def run(a: GenerateArguments) -> list[str]:
    """Complete all prompts; print what is made, or write it. Returns the completions of a single prompt."""
    from unmask.decoding import make_decoder

    prompts = a.prompts()
    # a mistake in the decoder is found before weights are read
    decoder = a.decoder and make_decoder(a.decoder, max_new_tokens=a.max_new_tokens).config()
    lm = a.load()
    if a.input is None and a.output is None and not a.json:
        return _show(lm, a, str(prompts[0]["prompt"]))
    n, total = a.num_return_sequences, len(prompts) * a.num_return_sequences
    settings = {"model": lm.name, "weights": lm.weights, "decoder": decoder, **a.options(), "seed": a.seed}
    del settings["batch_size"]  # completions do not depend on it

    def completions(first: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Records of the completions from prompt ``first`` on, some prompts at a time, in their order."""
        some = max(1, 4 * a.batch_size // n)  # several batches, so that finished rows make room for others
        for start in range(first, len(prompts), some):
            rows = prompts[start : start + some]
            texts: list[Any] = [row.get("prompt", row.get("messages")) for row in rows]
            out = lm.generate(texts, a.decoder, seed=a.seed + start * n, **a.options())
            yield [
                {**rows[i // n], "index": start * n + i, "completion": text, "nfe": nfe, "settings": settings}
                for i, (text, nfe) in enumerate(zip(out.texts, out.nfe, strict=True))
            ]

    if a.output is None:
        for records in completions():
            print(as_lines(records), end="", flush=True)
        return []
    schema = {"index": int, "completion": str, "settings": dict}
    store = RecordStore(Path(a.output), schema, itemgetter("index"), "choose another --output")
    with writing_to(store.path):
        store.path.parent.mkdir(parents=True, exist_ok=True)
        done = store.merge()
    for index, record in done.items():
        row = prompts[index // n] if index < total else {"prompt": None}
        if record["settings"] != settings or any(record.get(k) != v for k, v in row.items()):
            raise UserError(f"{a.output} holds completions of other prompts or settings: choose another --output")
    first = next((i for i in range(total) if i not in done), total) // n
    with progress_bars() as report:
        report(store.path.name, len(done), total)
        for records in completions(first):
            with writing_to(store.path):
                store.append(r for r in records if r["index"] not in done)
            report(store.path.name, records[-1]["index"] + 1, total)
    return []


def _show(lm: MaskedLM, a: GenerateArguments, prompt: str) -> list[str]:
    """Print the completions of one prompt; a terminal sees the canvas of a single one fill."""
    from unmask.decoding.stream import LiveCanvas

    screen, streamer = console(), None
    if screen.is_terminal and a.num_return_sequences == 1:
        streamer = LiveCanvas(lm, screen, f"{lm.name} · {a.decoder or 'semi-ar'}", a.delay)
    try:
        out = lm.generate(prompt, a.decoder, seed=a.seed, streamer=streamer, **a.options())
    finally:  # on Ctrl-C too the cursor comes back
        if streamer is not None:
            streamer.end()
    print(*out.texts, sep="\n\n", flush=True)
    return out.texts
