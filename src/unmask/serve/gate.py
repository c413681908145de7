"""What every request passes: the key, the size of its body, headers of the response, counts."""

from __future__ import annotations

import secrets
import time

from fastapi import HTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unmask.serve.engine import Engine
from unmask.serve.errors import error_response

MAX_BODY = 2**20  # bytes
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


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
            says = f"the request has {length[:20].decode('latin-1')} bytes: send at most {MAX_BODY}"
            refused = error_response(413, says)
            while length.isdigit() and int(length[:20]) < 16 * MAX_BODY:  # who still writes would not see the answer
                if not (await receive()).get("more_body"):
                    break
        try:
            await (refused or self.app)(scope, receive_on, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)
