"""The routes of ``unmask serve``: OpenAI's API, what the page needs beyond it, and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import Field, fields, replace
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from docstring_parser import parse_from_object
from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.responses import Response as HTTPResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import unmask
from unmask.decoding.confidence import CONFIDENCES
from unmask.decoding.decoder import PRESETS, SCHEDULES, Decoder
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM
from unmask.serve.config import ServeArguments
from unmask.serve.engine import Completion, DeadlineExceeded, Done, Engine, Event, QueueFull
from unmask.serve.protocol import (
    CandidatesRequest,
    ChatRequest,
    CompletionRequest,
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
MAX_BODY = 2**20  # bytes
EXAMPLES = 4  # problems a task
KEEP_ALIVE = 15.0  # seconds without an event, after which a stream sends a comment
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
FILES = {
    "page.js": ("unmask.serve", "page.js", "text/javascript"),
    "page.css": ("unmask.serve", "page.css", "text/css"),
    "canvas.js": ("unmask.view", "canvas.js", "text/javascript"),
    "view.css": ("unmask.view", "page.css", "text/css"),
}
# What a message of the library calls by its own name.
API_NAMES = {"--max-new-tokens": "max_tokens", "num_return_sequences": "n"}


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    for name, ours in API_NAMES.items():
        message = message.replace(name, ours)
    plain = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": plain, "type": kind, "param": param, "code": status}}


def status_of(error: BaseException) -> tuple[int, str]:
    """The status of a request that ended with an error, and what is said of it."""
    if isinstance(error, UserError):
        return 400, str(error)
    if isinstance(error, QueueFull):
        return 429, "the queue is full: try again later"
    if isinstance(error, DeadlineExceeded):
        return 504, "the request took longer than its deadline: ask for fewer tokens or try again later"
    return 500, "the server failed at this request; its log says more"


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 429 else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(error_body(status, message, param), status, headers)


class Metrics:
    """What ``/metrics`` says, in Prometheus' words."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "unmask_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram("unmask_request_seconds", "Until the last byte.", ["route"], registry=registry)
        self.tokens = Counter("unmask_completion_tokens", "Tokens of completions.", registry=registry)
        self.pass_seconds = Histogram("unmask_pass_seconds", "A forward pass and its commits.", registry=registry)
        self.pass_rows = Histogram(
            "unmask_pass_rows", "Rows of a forward pass.", registry=registry, buckets=[2**i for i in range(9)]
        )
        Gauge("unmask_running", "Rows of the batch.", registry=registry).set_function(lambda: engine.running)
        Gauge("unmask_waiting", "Completions that wait.", registry=registry).set_function(lambda: len(engine.waiting))
        engine.on_pass = self.observe_pass

    def observe_pass(self, seconds: float, rows: int) -> None:
        self.pass_seconds.observe(seconds)
        self.pass_rows.observe(rows)


class Gate:
    """ASGI middleware: the key, the size of a body, headers of every response, counts."""

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, size, began, status = dict(scope["headers"]), 0, time.perf_counter(), 500

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS.items()]
            await send(message)

        async def receive_on() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"the request has more than {MAX_BODY} bytes: send less")
            return message

        refused = None
        length = headers.get(b"content-length", b"0")
        open_to_all = scope["path"] in ("/", "/health") or scope["path"].startswith("/assets/")
        right = self.key is None or secrets.compare_digest(headers.get(b"authorization", b""), self.key)
        if not right and not open_to_all:
            says = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
            refused = error_response(401, says)
        if refused is None and (not length.isdigit() or int(length[:20]) > MAX_BODY):
            refused = error_response(
                413, f"the request has {length[:20].decode('latin-1')} bytes: send at most {MAX_BODY}"
            )
        try:
            await (refused or self.app)(scope, receive_on, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)


class Service:
    """A model, its engine, and what requests need of both."""

    def __init__(self, lm: MaskedLM, a: ServeArguments) -> None:
        self.lm, self.arguments = lm, a
        self.name = Path(lm.name).name if os.path.exists(lm.name) else lm.name  # no path of this machine
        self.engine = Engine(lm, a.max_batch, a.max_queue)
        self.metrics = Metrics(self.engine)

    def prepare(self, request: Request, put: Callable[[tuple[int, Event]], None]) -> list[Completion]:
        """The completions that a request asks for. Raises UserError, and HTTPException for another model."""
        a, lm, found = self.arguments, self.lm, list[Completion]()
        if request.model not in (None, self.name):
            raise HTTPException(404, f"there is no model {request.model!r}: use {self.name!r}")
        rows, stops = request.rows(lm), request.stops
        if len(rows) * request.n > a.max_queue:
            asked = f"{len(rows) * request.n} completions are asked for"
            raise UserError(f"{asked}, and the queue takes {a.max_queue}: ask for fewer at a time")
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        deadline = time.monotonic() + min(a.deadline, request.timeout or a.deadline)
        for row in rows:
            decoder, limit = request.decoder_and_limit(lm, row, a.decoder, a.max_new_tokens)
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

        completions = self.prepare(request, put)
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
        drafts, sent, open_ = (
            request.stream_options and request.stream_options.drafts,
            [""] * len(completions),
            len(completions),
        )
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
        lm, (_, _, found) = self.lm, request.read(self.lm, self.arguments.decoder)
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
            prompt, decoder, found = asked.read(self.lm, self.arguments.decoder)
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
            "default_decoder": a.decoder or "semi-ar",
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


def create_app(lm: MaskedLM, a: ServeArguments) -> FastAPI:
    """The application; its engine runs from now on until the application's shutdown."""
    service = Service(lm, a)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.engine.stop()

    about: dict[str, Any] = {"title": "unmask", "version": unmask.__version__, "docs_url": None, "redoc_url": None}
    app = FastAPI(**about, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Gate, api_key=a.api_key if a.auth else None, metrics=service.metrics)

    @app.exception_handler(StarletteHTTPException)
    async def refuse(http: HTTPRequest, error: StarletteHTTPException) -> HTTPResponse:
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(http: HTTPRequest, error: RequestValidationError) -> HTTPResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        what = "this field is unknown here, leave it out" if first["type"] == "extra_forbidden" else first["msg"]
        return error_response(400, f"{where or 'the body'}: {what}", where or None)

    async def refuse_any(http: HTTPRequest, error: Exception) -> HTTPResponse:
        return error_response(*status_of(error))

    for kind in (UserError, QueueFull, DeadlineExceeded, Exception):
        app.add_exception_handler(kind, refuse_any)

    @app.exception_handler(ClientDisconnect)
    async def nobody(http: HTTPRequest, error: ClientDisconnect) -> HTTPResponse:
        return HTTPResponse(status_code=499)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: HTTPRequest) -> HTTPResponse:
        return await service.complete(request, http)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HTTPRequest) -> HTTPResponse:
        return await service.complete(request, http)

    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "unmask"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def model_named(name: str) -> dict[str, Any]:
        if name != service.name:
            raise HTTPException(404, f"there is no model {name!r}: use {service.name!r}")
        return model

    @app.get("/unmask/info")
    def info() -> dict[str, Any]:
        return service.info()

    @app.post("/unmask/candidates")
    async def candidates(request: CandidatesRequest, http: HTTPRequest) -> dict[str, Any]:
        return await service.call(http, service.candidates(request))

    @app.post("/unmask/grade")
    def grade(request: GradeRequest) -> dict[str, Any]:
        return service.grade(request)

    @app.post("/unmask/view")
    async def view(request: ViewRequest, http: HTTPRequest) -> HTTPResponse:
        found = await service.call(http, service.page(request))
        return HTTPResponse(
            found, media_type="text/html", headers={"Content-Disposition": 'attachment; filename="unmask.html"'}
        )

    @app.get("/health")
    async def health() -> HTTPResponse:
        alive = service.engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> HTTPResponse:
        return HTTPResponse(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def page() -> HTTPResponse:
        return HTMLResponse(_asset("unmask.serve", "page.html"))

    @app.get("/assets/{file}")
    async def asset(file: str) -> HTTPResponse:
        if file not in FILES:
            raise HTTPException(404, f"there is no file {file!r}")
        package, name, kind = FILES[file]
        return HTTPResponse(_asset(package, name), media_type=kind)

    return app


def _asset(package: str, name: str) -> bytes:
    return (resources.files(package) / name).read_bytes()
