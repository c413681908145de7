"""A model behind its engine: what the routes do with it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import Field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from docstring_parser import parse_from_object
from fastapi import HTTPException
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.responses import Response as HTTPResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from unmask.decoding.confidence import CONFIDENCES
from unmask.decoding.decoder import PRESETS, SCHEDULES, Decoder
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM
from unmask.serve.config import ServeArguments
from unmask.serve.engine import Completion, Done, Engine, Event
from unmask.serve.errors import error_body, status_of
from unmask.serve.gate import Metrics
from unmask.serve.protocol import (
    CandidatesRequest,
    Default,
    GradeRequest,
    Request,
    Response,
    ViewRequest,
    encode_row,
)
from unmask.tasks import TASKS, make_task
from unmask.tasks.base import Problem, Task, grade_completion
from unmask.view.page import Panel, page_bytes, token_glyph, token_name, top_candidates_per_step

log = logging.getLogger("unmask.serve")
T = TypeVar("T")
EXAMPLES = 4  # problems a task
KEEP_ALIVE = 15.0  # seconds without an event, after which a stream sends a comment


class Service:
    """A model, its engine, and what requests need of both."""

    def __init__(self, lm: MaskedLM, a: ServeArguments) -> None:
        self.arguments, self.default = a, Default(a.decoder, a.max_new_tokens)
        self.name = Path(lm.name).name if os.path.exists(lm.name) else lm.name
        self.lm = lm = replace(lm, name=self.name)  # no message holds a path of this machine
        self.lock = threading.Lock()
        self.engine = Engine(lm, a.max_batch, a.max_queue)
        self.metrics = Metrics(self.engine)

    def prepare(self, request: Request, put: Callable[[tuple[int, Event]], None]) -> list[Completion]:
        """The completions that a request asks for. Raises UserError, and HTTPException for another model."""
        with self.lock:  # tokenizers are used by one thread at a time
            return self._prepare(request, put)

    def _prepare(self, request: Request, put: Callable[[tuple[int, Event]], None]) -> list[Completion]:
        a, lm, found = self.arguments, self.lm, list[Completion]()
        if request.model not in (None, self.name):
            raise HTTPException(404, f"there is no model {request.model!r}: use {self.name!r}")
        prompts, stops = request.prompts, request.stops
        if not 0 < len(prompts) * request.n <= a.max_queue:
            asked = f"{len(prompts) * request.n} completions are asked for"
            raise UserError(f"{asked}, and the queue takes 1 to {a.max_queue} at a time: ask for as many")
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        deadline = time.monotonic() + min(a.deadline, request.timeout or a.deadline)
        for prompt in prompts:
            row = request.row(lm, prompt)  # type: ignore[arg-type]
            decoder, limit = request.decoder_and_limit(lm, row, self.default)
            encoded = encode_row(lm, row, decoder.max_new_tokens)
            for _ in range(request.n):
                tell = partial(lambda number, event: put((number, event)), len(found))
                how: dict[str, Any] = {"stop": stops, "limit": limit, "steps": request.stream, "deadline": deadline}
                found.append(Completion(encoded, decoder, seed + len(found), tell, **how))
        if a.log_prompts:
            log.info("prompts %r", [lm.tokenizer.decode([*completion.row.prompt]) for completion in found])
        return found

    async def complete(self, request: Request, http: HTTPRequest) -> HTTPResponse:
        """The response to a chat or completion request."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def put(item: tuple[int, Event]) -> None:
            with suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(queue.put_nowait, item)

        completions = await run_in_threadpool(self.prepare, request, put)  # a long prompt keeps nobody else waiting
        response = Response(self.lm, self.name, request, completions)
        self.engine.submit(completions)
        if request.stream:
            events = self.events(request, response, completions, queue)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

        async def collect() -> list[Done]:
            found: dict[int, Done] = {}
            while len(found) < len(completions):
                number, event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Done):
                    found[number] = event
            return [found[number] for number in range(len(completions))]

        try:
            found = await while_connected(http, collect())
        finally:
            for completion in completions:
                completion.cancelled = True
        whole = response.whole(found)
        self.count(response, [done.text for done in found])
        return JSONResponse(whole)

    async def events(
        self,
        request: Request,
        response: Response,
        completions: Sequence[Completion],
        queue: asyncio.Queue[tuple[int, Event]],
    ) -> AsyncIterator[str]:
        """The server-sent events of a stream; ends its rows if nobody reads them."""
        drafts = request.stream_options and request.stream_options.drafts
        sent, open_ = [""] * len(completions), len(completions)
        try:
            for number in range(len(completions)):
                yield as_event(response.chunk([response.said(number, "", "delta")]))
                if drafts:
                    yield as_event(response.first_draft(number))
            while open_:
                try:
                    number, event = await asyncio.wait_for(queue.get(), KEEP_ALIVE)
                except TimeoutError:
                    yield ": the server is at work\n\n"
                    continue
                if isinstance(event, Exception):
                    yield as_event(error_body(*status_of(event)))
                    return
                more = event.text[len(sent[number]) :]
                sent[number] += more
                if isinstance(event, Done):
                    open_ -= 1
                    yield as_event(response.chunk([response.finished(number, event, more, "delta")]))
                    continue
                if drafts:
                    yield as_event(response.draft(number, event))
                if more:
                    yield as_event(response.chunk([response.said(number, more, "delta")]))
            if request.stream_options and request.stream_options.include_usage:
                yield as_event(response.chunk([], usage=response.usage))
            self.count(response, sent)
            yield "data: [DONE]\n\n"
        finally:
            for completion in completions:
                completion.cancelled = True

    def count(self, response: Response, texts: Sequence[str]) -> None:
        """For metrics and log, once a request is done."""
        self.metrics.tokens.inc(response.usage["completion_tokens"])
        if self.arguments.log_prompts:
            log.info("completions %r", texts)

    async def call(self, http: HTTPRequest, work: Generator[None, None, T]) -> T:
        """What a generator on the engine's thread returns; it ends where the client goes away."""
        return await while_connected(http, asyncio.wrap_future(self.engine.call(work)))

    def candidates(self, request: CandidatesRequest) -> Generator[None, None, dict[str, Any]]:
        """Before a step, the likeliest tokens of every masked cell: one forward pass."""
        lm, (_, _, found) = self.lm, request.read(self.lm, self.default)
        state = found.state(request.before)
        masked = state == lm.mask_id

        def shown(token: int) -> str:
            return " ".join([token_glyph(lm, token), *[token_name(lm, token)] * (token in lm.end_ids)])

        if not masked.any():
            return {"cells": {}}
        yield
        (tokens, probs), *_ = top_candidates_per_step(
            lm, replace(found, tokens=state, step=masked.to(torch.int16) - 1), request.count
        )
        cells = {}
        for at, top, share in zip(masked[0].nonzero()[:, 0].tolist(), tokens.tolist(), probs.tolist(), strict=True):
            cells[at] = [[token, shown(token), p] for token, p in zip(top, share, strict=True)]
        return {"cells": cells}

    def page(self, request: ViewRequest) -> Generator[None, None, bytes]:
        """The page of ``unmask view`` for decodes that were made here: a forward pass a step."""
        panels, prompts = [], []
        for asked in request.panels:
            prompt, decoder, found = asked.read(self.lm, self.default)
            candidates = []
            for step in top_candidates_per_step(self.lm, found, 5):
                candidates.append(step)
                yield
            if not candidates:
                raise UserError("a panel has no step: send a decode that has begun")
            panels.append(Panel(decoder, found, candidates, asked.text, asked.solved, None))
            prompts.append(prompt)
        return page_bytes(self.lm, prompts[0], panels)

    @cached_property
    def examples(self) -> dict[str, tuple[Task, list[Problem]]]:
        """A few test problems of the tasks that the checkpoint was trained for, or of the shipped ones."""
        names = [name for name in self.lm.task_defaults if name in TASKS] or ["sudoku", "countdown"]
        tasks = [make_task(name, self.lm.task_defaults) for name in names]
        return {task.name: (task, task.problems("test", EXAMPLES)) for task in tasks}

    def info(self) -> dict[str, Any]:
        """What the page starts from."""
        lm, a, texts = self.lm, self.arguments, parse_from_object(Decoder).params
        size = len(lm.tokenizer)
        about = {text.arg_name: " ".join((text.description or "").replace("``", "").split()) for text in texts}
        hints = get_type_hints(Decoder)

        def parameter(f: Field[Any]) -> dict[str, Any]:
            arms = [arm for arm in (get_args(hints[f.name]) or (hints[f.name],)) if arm is not type(None)]
            names = {"confidence": [*CONFIDENCES], "schedule": [*SCHEDULES]}.get(f.name)
            choices = names or [arm for arm in arms if isinstance(arm, str)] or None
            kind = "str" if choices else arms[0].__name__
            return {
                "name": f.name,
                "type": kind,
                "default": f.default,
                "choices": choices,
                "about": about.get(f.name, ""),
            }

        examples = [
            {
                "task": task.name,
                "index": i,
                "title": f"{task.name} {i + 1}",
                "messages": [{"role": "user", "content": task.instruction(problem)}],
                "prefill": task.prefill,
            }
            for task, problems in self.examples.values()
            for i, problem in enumerate(problems)
        ]
        return {
            "model": self.name,
            "weights": lm.weights,
            "max_length": lm.max_length,
            "block_length": lm.block_length,
            "mask_id": lm.mask_id,
            "glyph_width": median(len(token_glyph(lm, i)) for i in range(0, size, 1 + size // 1000)),
            "max_new_tokens": a.max_new_tokens,
            "default_decoder": self.default.name,
            "decoders": dict(PRESETS),
            "fields": [parameter(f) for f in fields(Decoder) if f.name not in ("name", "max_new_tokens")],
            "examples": examples,
        }

    def grade(self, request: GradeRequest) -> dict[str, Any]:
        """Whether a completion solves an example. Raises UserError where there is none of that name and number."""
        task, problems = self.examples.get(request.task, (None, []))
        if task is None or request.index >= len(problems):
            known = f"{', '.join(self.examples)}, each 0 to {EXAMPLES - 1}"
            raise UserError(f"there is no example {request.task!r} {request.index}: choose from {known}")
        found = grade_completion(task, problems[request.index], request.completion)
        return {"solved": found.solved, "score": found.points / found.possible, "score_name": task.score_name}


def as_event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def while_connected(http: HTTPRequest, work: Awaitable[T]) -> T:
    """What ``work`` gives. Raises ClientDisconnect, and cancels it, once nobody waits for it any more."""

    async def disconnect() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
