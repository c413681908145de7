"""On a device of its own (tests/pretend.py) nothing mixes with the CPU, and the host waits no more often than is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("what", ["decode", "train", "benchmarks"])
def test_a_device_gives_the_same_results(what: str) -> None:
    script = Path(__file__).parent / "pretend.py"
    done = subprocess.run([sys.executable, str(script), what], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
