"""The routes of ``unmask serve``: OpenAI's API, what the page needs beyond it, and the page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.responses import Response as HTTPResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

import unmask
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM
from unmask.serve.config import ServeArguments
from unmask.serve.engine import DeadlineExceeded, QueueFull, Stopping
from unmask.serve.errors import error_response, status_of
from unmask.serve.gate import Gate
from unmask.serve.protocol import CandidatesRequest, ChatRequest, CompletionRequest, GradeRequest, ViewRequest
from unmask.serve.service import Service

FILES = {
    "page.js": ("unmask.serve", "page.js", "text/javascript"),
    "page.css": ("unmask.serve", "page.css", "text/css"),
    "canvas.js": ("unmask.view", "canvas.js", "text/javascript"),
    "view.css": ("unmask.view", "page.css", "text/css"),
}


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
        said = {404: "there is no such route", 405: f"this route takes no {http.method}"}.get(error.status_code)
        generic = error.detail in ("Not Found", "Method Not Allowed")
        fix = "docs/serving.md lists the routes" if generic else "send a JSON object"
        if generic or "parsing the body" in str(error.detail):
            return error_response(error.status_code, f"{said or 'the body cannot be read'}: {fix}")
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(http: HTTPRequest, error: RequestValidationError) -> HTTPResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is no JSON ({first['ctx']['error']}): send one JSON object")
        kinds = ("body", "str", "TextPart")  # parts of the place that are no names of fields
        where = ".".join(str(part) for part in first["loc"] if part not in kinds and "[" not in str(part))
        what = "this field is unknown here, leave it out" if first["type"] == "extra_forbidden" else first["msg"]
        if not where:
            what = "send a JSON object with the header Content-Type: application/json"
        return error_response(400, f"{where or 'the body'}: {what}", where or None)

    async def refuse_any(http: HTTPRequest, error: Exception) -> HTTPResponse:
        return error_response(*status_of(error))

    for kind in (UserError, QueueFull, Stopping, DeadlineExceeded, Exception):
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

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> HTTPResponse:
        alive = service.engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> HTTPResponse:
        return HTTPResponse(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.head("/", include_in_schema=False)
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
