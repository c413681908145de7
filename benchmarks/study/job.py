"""``python -m benchmarks.study.job COMMAND …``: a command of unmask that ends, with all that it started, when its input ends.

The study holds the other end of the pipe and never writes: the input ends when the study does, however that ends.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
from contextlib import suppress


def _end_with_input() -> None:
    with suppress(OSError):
        os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    runpy.run_module("unmask", run_name="__main__", alter_sys=True)
