"""Arguments of ``unmask serve``, read without torch, so that help and errors appear at once."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from unmask.errors import UserError, check_at_least
from unmask.models.source import ModelSource


@dataclass(kw_only=True)
class ServeArguments(ModelSource):
    """Serve a model over OpenAI's API, and a page at / on which a canvas fills while one watches."""

    decoder: str | None = None
    """Decoder spec or YAML file for requests that name none; ``none``: semi-ar, for templates full."""
    max_new_tokens: int = 128
    """Canvas length in tokens of requests that do not set ``max_tokens``."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs an API key."""
    port: int = 8000
    """0: a free one, which is printed."""
    api_key: str | None = None
    """Key that clients must send; better in the environment variable UNMASK_API_KEY, which other users cannot list."""
    auth: bool = True
    """``--no-auth``: listen on another host without a key."""
    max_batch: int = 32
    """Rows of one forward pass."""
    max_queue: int = 256
    """Completions that may wait for a row; more are refused with status 429."""
    deadline: float = 600.0
    """Seconds that a request may take."""
    log_prompts: bool = False
    """Write prompts and completions to the log."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_new_tokens", "max_batch", "max_queue")
        if self.max_new_tokens >= 2**15:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: choose less than {2**15}")
        if not 0 <= self.port < 2**16:
            raise UserError(f"port is {self.port}: choose 0 to {2**16 - 1}")
        if not 0 < self.deadline < float("inf"):
            raise UserError(f"deadline is {self.deadline}: choose seconds above 0")
        self.api_key = self.api_key or os.environ.get("UNMASK_API_KEY") or None
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("the API key has characters that no header can carry: use printable ASCII")
        if self.auth and self.api_key is None and not _is_loopback(self.host):
            reach = f"host is {self.host}, so others can reach the server, and there is no API key"
            raise UserError(f"{reach}: set UNMASK_API_KEY, or say --no-auth")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
