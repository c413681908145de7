"""On a device of its own (tests/pretend.py) nothing mixes with the CPU, and the host waits no more often than is known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("what", ["decode", "train", "benchmarks"])
def test_a_device_gives_the_same_results(what: str) -> None:
    root = Path(__file__).parent.parent  # where the benchmarks are
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(root / "tests" / "pretend.py"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
