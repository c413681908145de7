"""What goes wrong, as OpenAI's API says it."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from unmask.errors import UserError
from unmask.serve.engine import DeadlineExceeded, QueueFull, Stopping

# What a message of the library calls by its own name.
API_NAMES = {"--max-new-tokens": "max_tokens"}


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
    if isinstance(error, Stopping):
        return 503, "the server is ending: try again later"
    if isinstance(error, DeadlineExceeded):
        return 504, "the request took longer than its deadline: ask for fewer tokens or try again later"
    return 500, "the server failed at this request; its log says more"


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 429 else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(error_body(status, message, param), status, headers)
