"""Requests as OpenAI's API writes them, with the fields that this one adds; responses from what the engine found."""

from __future__ import annotations

import secrets
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field

from unmask.config import split_spec
from unmask.decoding.decoder import PRESETS, Decoder, make_decoder
from unmask.decoding.generate import GAP, PreparedRow, prepare_row
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM
from unmask.serve.engine import Completion, Done, Step
from unmask.view.page import token_glyph

Spec = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+(:[A-Za-z0-9_.+=, -]*)?$", max_length=500)]
Length = Annotated[int, Field(ge=1, lt=2**15)]
Nothing = Annotated[float, Field(ge=0, le=0)] | None
TokenIds = list[int]
DEFAULT = "default"  # the server's own decoder
MAX_STOPS, MAX_STOP = 16, 1000  # strings, and characters of each


class Strict(BaseModel):
    """What is unknown is refused, so that no option is passed over in silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="Not used.")

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Not used.")
    drafts: bool = Field(False, description="Also send what every step commits.")


class Options(Strict):
    """What both kinds of request have."""

    model: str | None = None
    decoder: Spec | None = Field(None, description="A preset with parameters, e.g. eoser-ass:blocks=2.")
    max_tokens: Length | None = Field(
        None, description="Canvas length, rounded up to the decoder's blocks; the text is cut."
    )
    n: int = Field(1, ge=1, le=1024)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**62, description="Completion i draws from seed + i.")
    temperature: float | None = Field(None, ge=0, le=1e6)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_trajectory: bool = Field(False, description="Step and log-probability of every token.")
    timeout: float | None = Field(None, gt=0, description="Seconds; the server's own deadline holds too.")
    frequency_penalty: Nothing = None
    presence_penalty: Nothing = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = Field(None, description="Not used.")

    def decoder_and_limit(self, lm: MaskedLM, row: PreparedRow, default: Default) -> tuple[Decoder, int | None]:
        """How a row is decoded, and after how many tokens its text is cut (None: it is not). Raises UserError."""
        limit = self.max_tokens or getattr(self, "max_completion_tokens", None)
        decoder = fit_decoder(lm, row, self.decoder, default, limit or default.canvas)
        changes = {key: value for key in ("temperature", "top_p") if (value := getattr(self, key)) is not None}
        decoder = decoder.replace(**changes)
        decoder.check_draws(self.n, "n")
        return decoder, limit if limit and not row.canvas and limit < decoder.max_new_tokens else None

    @property
    def stops(self) -> list[str]:
        """The stop strings. Raises UserError for an empty or long one, or too many."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP for stop in stops):
            allowed = f"up to {MAX_STOPS}, each of 1 to {MAX_STOP} characters"
            raise UserError(f"stop has {len(stops)} strings: pass {allowed}")
        return stops


class ChatRequest(Options):
    messages: list[Message] = Field(min_length=1)
    prefill: str = Field("", description="Text that the assistant's turn starts with; it may have gaps <|mask:N|>.")
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    store: bool | None = Field(None, description="Not used.")
    metadata: dict[str, str] | None = Field(None, description="Not used.")

    @property
    def prompts(self) -> list[list[dict[str, str]]]:
        return [[message.plain() for message in self.messages]]

    def row(self, lm: MaskedLM, prompt: list[dict[str, str]]) -> PreparedRow:
        return prepare_row(lm, prompt, self.prefill)


class CompletionRequest(Options):
    prompt: str | TokenIds | list[str] | list[TokenIds] = Field(
        description="Raw text or token ids; a text may have gaps."
    )
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    echo: Literal[False] = False
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def prompts(self) -> list[str | TokenIds]:
        several = isinstance(self.prompt, list) and not any(isinstance(part, int) for part in self.prompt)
        return self.prompt if several else [self.prompt]  # type: ignore[return-value,list-item]

    def row(self, lm: MaskedLM, prompt: str | TokenIds) -> PreparedRow:
        """A text as it is, without a chat template."""
        return _raw(lm, prompt)


Request: TypeAlias = ChatRequest | CompletionRequest


class State(Strict):
    """A canvas, finished or in the middle of its decode, behind its prompt: what a draft or a trajectory told of it."""

    messages: list[Message] | None = None
    prompt: str | None = None
    prefill: str = ""
    decoder: Spec | None = None
    tokens: list[int] = Field(min_length=1, max_length=2**15 - 1)
    step: list[Annotated[int, Field(ge=-1, lt=2**15)]]
    logprob: list[Annotated[float, Field(le=0)]] | None = None

    def read(self, lm: MaskedLM, default: Default) -> tuple[str, Decoder, Trajectory]:
        """The prompt as text, the decoder, and the decode of one row. Raises UserError where they do not belong together."""
        if (self.messages is None) == (self.prompt is None):
            raise UserError("pass one of messages and prompt")
        if self.messages is None:
            row = _raw(lm, self.prompt or "")
        else:
            row = prepare_row(lm, [message.plain() for message in self.messages], self.prefill)
        length, logprob = len(self.tokens), self.logprob or [0.0] * len(self.tokens)
        row, decoder = encode_row(lm, row, length), fit_decoder(lm, row, self.decoder, default, length)
        planned = len(row.canvas) or decoder.max_new_tokens
        if {len(self.step), len(logprob), planned} != {length} or {*self.step} - {-1} != {*range(max(self.step) + 1)}:
            own = f"{length} tokens with {len(self.step)} steps and {len(logprob)} log-probabilities, on a canvas of {planned}"
            raise UserError(f"{own}: send what a trajectory held, its steps from 0 on without a gap")
        given = [
            (t, s, own) for t, s, own in zip(self.tokens, self.step, row.canvas, strict=False) if own != lm.mask_id
        ]
        if any(token != own or step >= 0 for token, step, own in given):
            raise UserError("a token of the template was changed, or has a step: send what a trajectory held")
        prompt = torch.tensor([row.prompt], dtype=torch.int64)
        found = Trajectory(
            prompt,
            torch.ones_like(prompt, dtype=torch.bool),
            torch.tensor([lm.tokens(self.tokens)]),
            torch.tensor([self.step], dtype=torch.int16),
            torch.tensor([logprob]),
            lm.mask_id,
            decoder.config(),
        ).to(lm.device)
        return str(lm.tokenizer.decode([*row.prompt])), decoder, found


class CandidatesRequest(State):
    before: int = Field(ge=0, lt=2**15)
    count: int = Field(5, ge=1, le=20)


class PanelRequest(State):
    text: str = ""
    solved: bool | None = None


class ViewRequest(Strict):
    panels: list[PanelRequest] = Field(min_length=1, max_length=4)


class GradeRequest(Strict):
    task: str
    index: int = Field(ge=0)
    completion: str


def _raw(lm: MaskedLM, prompt: str | TokenIds) -> PreparedRow:
    if not prompt:
        raise UserError("the prompt is empty: pass some text")
    if isinstance(prompt, str) and not GAP.search(prompt):
        return PreparedRow(prompt)
    return prepare_row(lm, prompt)


def encode_row(lm: MaskedLM, row: PreparedRow, canvas: int) -> PreparedRow:
    """With the prompt as token ids. Raises UserError for what ``MaskedLM.encode`` refuses."""
    ids, _ = lm.encode([row.prompt], len(row.canvas) or canvas, empty=bool(row.canvas))
    return replace(row, prompt=tuple(ids[0].tolist()))


@dataclass(frozen=True)
class Default:
    """What holds for requests that do not say otherwise."""

    spec: str | None = None
    """Of the decoder; it may be a file or an import path, which requests may not name."""
    canvas: int = 128

    @cached_property
    def block_length(self) -> int | None:
        """Of the decoder's plan, to which canvases are rounded up."""
        return make_decoder(self.spec or "semi-ar", max_new_tokens=self.canvas).block_length

    @property
    def name(self) -> str:
        """How requests call the decoder."""
        spec = self.spec or "semi-ar"
        return spec if split_spec(spec)[0] in PRESETS else DEFAULT


def fit_decoder(lm: MaskedLM, row: PreparedRow, spec: str | None, default: Default, length: int) -> Decoder:
    """The decoder of a request for a canvas of ``length`` tokens, rounded up to its blocks. Raises UserError.

    A request may choose presets and their parameters, but neither files nor import paths.
    """
    if spec in (None, DEFAULT):
        spec, block = default.spec, str(default.block_length)
    else:
        name, parameters = split_spec(spec)
        if name not in PRESETS:
            raise UserError(f"unknown decoder {name!r}: choose from {', '.join(PRESETS)}")
        block = str(parameters.get("block_length", PRESETS[name].get("block_length")))
    if block.isdecimal() and 0 < int(block[:6]) < 2**15:
        length = -(-length // int(block)) * int(block)
    return row.make_decoder(lm, spec, length).within(lm.block_length)


class Response:
    """The objects of one response, whole or in chunks."""

    def __init__(self, lm: MaskedLM, name: str, request: Request, completions: Sequence[Completion]) -> None:
        self.lm, self.request, self.completions = lm, request, completions
        self.chat = isinstance(request, ChatRequest)
        self.head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": lm.weights,
            "seed": completions[0].seed,
        }
        # one count a prompt, though each of its completions has it
        prompts = sum(len(completion.row.prompt) for completion in completions[:: request.n])
        self.usage = {"prompt_tokens": prompts, "completion_tokens": 0, "total_tokens": prompts, "forward_passes": 0}

    def whole(self, found: Sequence[Done]) -> dict[str, Any]:
        """The response to a request without a stream."""
        choices = [self.finished(i, done, done.text, "message") for i, done in enumerate(found)]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A part of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, **more}

    def said(self, index: int, text: str, key: str) -> dict[str, Any]:
        """A choice that is not finished, and its text or more of it."""
        said = {key: {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": None}

    def finished(self, index: int, done: Done, text: str, key: str) -> dict[str, Any]:
        """A finished choice; counts what it took."""
        columns, nfe, request = self.columns(index, done), int(done.trajectory.nfe), self.request
        counts = {"completion_tokens": len(columns), "total_tokens": len(columns), "forward_passes": nfe}
        for count, more in counts.items():
            self.usage[count] += more
        choice = {**self.said(index, text, key), "finish_reason": done.reason, "nfe": nfe}
        if request.logprobs is not None and request.logprobs is not False:
            choice["logprobs"] = self.logprobs(columns, done)
        if request.return_trajectory:
            choice["trajectory"] = self.trajectory(done.trajectory)
        return choice

    def columns(self, index: int, done: Done) -> list[int]:
        """Columns of the canvas that the text shows and a step committed; of a template, those of its gaps."""
        completion, tokens = self.completions[index], done.trajectory.tokens[:, : self.completions[index].limit]
        if completion.row.canvas:
            ids, mask, unseen = tokens[0].tolist(), self.lm.mask_id, (self.lm.mask_id, *self.lm.end_ids)
            return [i for i, own in enumerate(completion.row.canvas) if own == mask and ids[i] not in unseen]
        found, decode = tokens[0, : int(self.lm.lengths(tokens))].tolist(), self.lm.tokenizer.decode
        if not completion.stop:
            return [*range(len(found))]

        def length_of(count: int) -> int:
            return len(str(decode(found[:count])).rstrip("\ufffd"))

        # the fewest tokens whose text is as long
        return [*range(bisect_left(range(len(found)), len(done.text), key=length_of))]

    def logprobs(self, columns: list[int], done: Done) -> dict[str, Any]:
        """Log-probabilities (nats, temperature 1) of tokens in the states that committed them."""
        tokens, every = done.trajectory.tokens[0].tolist(), done.trajectory.logprob[0].tolist()
        texts, logprobs = [str(self.lm.tokenizer.decode([tokens[i]])) for i in columns], [every[i] for i in columns]
        if not self.chat:
            return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": None}
        content = [
            {
                "token": text,
                "logprob": logprob,
                "bytes": None if "\ufffd" in text else [*text.encode()],
                "top_logprobs": [],
            }
            for text, logprob in zip(texts, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def trajectory(self, found: Trajectory) -> dict[str, Any]:
        """The whole canvas: tokens, how each is shown, the step that committed it (-1: none did), its log-probability."""
        tokens = found.tokens[0].tolist()
        return {
            "tokens": tokens,
            "texts": [token_glyph(self.lm, token) for token in tokens],
            "step": found.step[0].tolist(),
            "logprob": found.logprob[0].tolist(),
            "nfe": int(found.nfe),
            "steps": found.steps,
        }

    def first_draft(self, index: int) -> dict[str, Any]:
        """The canvas before its first step: how long it is, and a template's own tokens."""
        completion, mask = self.completions[index], self.lm.mask_id
        fixed = [[i, t, token_glyph(self.lm, t), None] for i, t in enumerate(completion.row.canvas) if t != mask]
        length, steps = len(completion.row.canvas) or completion.decoder.max_new_tokens, completion.decoder.plan.steps
        return self.chunk([], draft={"index": index, "canvas": length, "steps": steps, "cells": fixed})

    def draft(self, index: int, shown: Step) -> dict[str, Any]:
        """What a step committed."""
        cells = [[at, token, token_glyph(self.lm, token), logprob] for at, token, logprob in shown.cells]
        return self.chunk([], draft={"index": index, "step": shown.step, "cells": cells, "horizon": shown.horizon})
