"""A helper process that answers questions within bounds, so that no text can stop or harm the program that asks.

Its processor time and memory are limited where the system can, so that an answer does not depend on what else the machine
does. A question that takes too long ends a copy of the helper, made after its slow imports, and the next copy goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from unmask.errors import UserError

CPU_SECONDS = 0.5  # of the helper, for one question
WALL_SECONDS = 60.0  # for a question on a busy machine, or where processor time cannot be limited
START_SECONDS = 120.0
MEMORY = 2 << 30  # bytes
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Sets have one order, so that equal questions have equal answers; threads that nobody needs take no memory."""


class Helper:
    """The process of a script that calls ``main``; started by the first question, anew in a fork of this program."""

    def __init__(self, script: str, what: str) -> None:
        self.script, self.what = script, what
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0
        self.lock = threading.Lock()

    def ask(self, *question: Any) -> Any:
        """The reply to a question of JSON values; None where it took too much time or memory.

        Raises:
            TimeoutError: if no reply came in WALL_SECONDS, or the process is gone. The next question starts another.
            UserError: if the process cannot be started at all.
        """
        with self.lock:
            if self.process is None or self.owner != os.getpid():
                self.start()
            return json.loads(self.exchange(json.dumps(question), WALL_SECONDS))

    def start(self) -> None:
        code = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, self.script, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, **_ENVIRONMENT},
        )
        try:
            ready = self.exchange("", START_SECONDS)
        except TimeoutError:
            ready = ""
        if ready != "ready":
            raise UserError(f"the process that {self.what} did not start: try {sys.executable} {self.script}")

    def exchange(self, line: str, seconds: float) -> str:
        """Send a line and wait for one. TimeoutError from a process that is gone or late, which is ended."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            if line:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            reply = process.stdout.readline().strip()
        except (OSError, ValueError):
            reply = ""
        finally:
            timer.cancel()
            timer.join()
        if late.is_set() or not reply:
            process.kill()
            process.communicate()
            self.process = None
            raise TimeoutError
        return reply


def main(prepare: Callable[[], Callable[..., Any]]) -> None:
    """What the helper's script calls: limits memory, makes the function that answers, and serves."""
    _limit("RLIMIT_AS", MEMORY)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # whatever prints, prints elsewhere
    serve(prepare(), sys.stdin, channel, copies=hasattr(os, "fork"))


def serve(answer: Callable[..., Any], questions: IO[str], replies: IO[str], copies: bool = False) -> None:
    """The helper: the arguments of ``answer`` as a JSON list a line in, its result as JSON a line out.

    Args:
        copies: a copy of this process answers, within its time; whenever one is ended, null is the reply and another goes on.
    """
    print("ready", file=replies, flush=True)
    while copies and (copy := os.fork()):
        if os.waitpid(copy, 0)[1] == 0:  # no more questions
            return
        print("null", file=replies, flush=True)
    for line in iter(questions.readline, ""):
        if copies:
            limit_time(CPU_SECONDS)
        print(json.dumps(answer(*json.loads(line))), file=replies, flush=True)


def limit_time(seconds: float) -> None:
    """End this process once it has used so much more processor time, where the system can."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process


def _limit(name: str, value: int) -> None:
    """Limit this process, where the system can."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    kind = getattr(resource, name)
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or hard > value:
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, hard))
