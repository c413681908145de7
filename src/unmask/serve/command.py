"""``unmask serve``: load a model and serve it until a signal comes."""

from __future__ import annotations

import socket
from contextlib import suppress
from copy import deepcopy
from importlib.util import find_spec

from unmask.config import read_flags
from unmask.errors import UserError
from unmask.serve.config import ServeArguments


def command(arguments: list[str]) -> None:
    """The command line of ``unmask serve``."""
    a = read_flags(ServeArguments, arguments, prog="unmask serve")
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'unmask[serve]'")
    listener = bind(a.host, a.port)
    import uvicorn

    from unmask.decoding import make_decoder
    from unmask.serve.app import create_app

    if a.decoder is not None:  # a mistake is found before weights are read
        make_decoder(a.decoder, max_new_tokens=a.max_new_tokens)
    app = create_app(a.load(), a)
    host, port = listener.getsockname()[:2]
    print(f"page    http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
    print(f"API     http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    logs = deepcopy(uvicorn.config.LOGGING_CONFIG)
    logs["loggers"]["unmask"] = {**logs["loggers"]["uvicorn"], "level": "INFO"}
    logs["handlers"]["access"]["stream"] = "ext://sys.stderr"  # as all others
    config = uvicorn.Config(app, server_header=False, log_config=logs, timeout_graceful_shutdown=int(a.deadline) + 1)
    with suppress(KeyboardInterrupt):  # requests at work were finished first
        uvicorn.Server(config).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet. Raises UserError where the address cannot be had."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}): choose another --host or --port") from None
    return listener
