"""A worker process that answers questions within bounds, so that no text can stop or harm the program that asks.

Its processor time and memory are limited where the system can, so that an answer does not depend on what else the machine
does. A question that takes too long ends a copy of the worker, made after its slow imports, and the next copy takes over.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

from unmask.errors import UserError

CPU_SECONDS = 0.5  # of the worker, for one question
WALL_SECONDS = 60.0  # for a question on a busy machine, or where processor time cannot be limited
START_SECONDS = 120.0
MEMORY = 2 << 30  # bytes
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Sets have one order, so that equal questions have equal answers; threads that nobody needs take no memory."""
_CODE = "import sys; sys.path[:] = sys.argv[2:]; from unmask.tasks import bounded; bounded.serve(sys.argv[1])"


class BoundedProcess:
    """The process that serves a module's ``prepare``; started by the first question, anew in a fork of this program."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.process: Popen[str] | None = None
        self.owner = 0
        self.lock = threading.Lock()
        self.replies = lru_cache(maxsize=8192)(self._reply)

    def ask(self, *question: Any) -> Any:
        """The reply to a question of hashable JSON values; None where there is none, or it took too much time or memory.

        A reply that did not come in WALL_SECONDS, twice, is not remembered. UserError where the process cannot be started.
        """
        for _ in range(2):  # a machine that was suspended, or a process that somebody ended
            with suppress(TimeoutError):
                return self.replies(question)
        return None

    def _reply(self, question: Any) -> Any:
        with self.lock:
            if self.process is None or self.owner != os.getpid():
                self.owner = os.getpid()
                command, env = [sys.executable, "-c", _CODE, self.module, *sys.path], {**os.environ, **_ENVIRONMENT}
                self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, encoding="utf-8", env=env)
                try:
                    self._exchange(self.process, "", START_SECONDS)
                except TimeoutError:
                    raise UserError(f"the process of {self.module} did not start: try importing it in Python") from None
            return self._exchange(self.process, json.dumps(question) + "\n", WALL_SECONDS)

    def _exchange(self, process: Popen[str], line: str, seconds: float) -> Any:
        """Send a line and wait for one. TimeoutError from a process that is gone or late, which is ended."""
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            print(line, end="", file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):
            process.kill()
            with suppress(OSError, ValueError):
                process.communicate()
            self.process = None
            raise TimeoutError from None
        finally:
            timer.cancel()


def serve(module: str) -> None:
    """The worker: a line in is the JSON list of arguments of the function that the module's ``prepare`` returns, a line out
    its result: null where the function raises, or where the copy of this process that answers is ended by its limits.
    """
    with suppress(ImportError, ValueError, OSError):  # where the system can
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # whatever prints, prints elsewhere
    answer = import_module(module).prepare()
    print("true", file=replies, flush=True)
    while hasattr(os, "fork") and (copy := os.fork()):
        if os.waitpid(copy, 0)[1] == 0:  # no more questions
            return
        print("null", file=replies, flush=True)
    for line in iter(sys.stdin.readline, ""):
        limit_time(CPU_SECONDS)
        reply = None
        with suppress(Exception):  # code of others, which stumbles over some text
            reply = answer(*json.loads(line))
        print(json.dumps(reply), file=replies, flush=True)


def limit_time(seconds: float) -> None:
    """End this process once it has used so much more processor time, where the system can."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
