"""A server on a loopback port in a thread of the test's process."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn

from unmask.models.masked_lm import MaskedLM
from unmask.serve.app import create_app
from unmask.serve.command import bind
from unmask.serve.config import ServeArguments
from unmask.serve.service import Service


@contextmanager
def serving(lm: MaskedLM, **settings: Any) -> Iterator[tuple[str, Service]]:
    """Its address, without a slash at the end, and what is behind it."""
    app = create_app(lm, ServeArguments(**settings))
    listener = bind("127.0.0.1", 0)
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.service
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive() and not app.state.service.engine.thread.is_alive()


def client(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


def fetch(url: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON (or text), headers. ``body``: bytes as they are, all else as JSON; None: GET."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=120) as found:
            status, raw, received = found.status, found.read(), dict(found.headers)
    except urllib.error.HTTPError as error:
        status, raw, received = error.code, error.read(), dict(error.headers)
    try:
        return status, json.loads(raw), received
    except ValueError:
        return status, raw.decode(), received


def send_and_leave(address: str, body: dict[str, Any], after: int) -> None:
    """Send a request and close the connection after so many bytes of the response (0: at once)."""
    host, port = address.removeprefix("http://").split(":")
    text = json.dumps(body).encode()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text)
        seen = 0
        while seen < after and (part := connection.recv(min(4096, after - seen))):
            seen += len(part)
