"""The package is built as docs/architecture.md says: arrows point one way, and no files import each other in a circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "unmask"
ROOMS = re.findall(r"^\| `(\w+)` \|", (PACKAGE.parent.parent / "docs" / "architecture.md").read_text(), re.MULTILINE)
FRONT_DOOR = ("unmask.models.masked_lm", "decoding")
"""``lm.generate`` calls up."""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports anywhere, also inside functions."""
    files = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unmask"):
                if (name, room(node.module or "")) == FRONT_DOOR:
                    continue
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found[name].add(inner if inner in files else str(node.module))
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in files}
        found[name] -= {name, "unmask"}
    return found


def room(module: str) -> str:
    return (module + ".").split(".")[1]


def test_arrows_point_one_way() -> None:
    inside = imports().keys() - {"unmask", "unmask.__main__"}
    assert {room(name) for name in inside} == set(ROOMS)
    for name in inside:
        for other in imports()[name]:
            assert ROOMS.index(room(other)) <= ROOMS.index(room(name)), f"{name} imports {other}"


def test_no_circle_between_files() -> None:
    TopologicalSorter({n: others for n, others in imports().items() if n != "unmask"}).prepare()


UNCHANGED = """
import logging, os, sys, warnings
def state():
    root = logging.getLogger()
    return [*sys.path], dict(os.environ), [*warnings.filters], root.level, [*root.handlers]
before = state()
import unmask
assert state() == before, "import unmask"
import matplotlib, transformers
def state():
    bars, backend = transformers.utils.logging.is_progress_bar_enabled(), matplotlib.rcParams._get("backend")
    return [*sys.path], dict(os.environ), bars, backend, "matplotlib.pyplot" in sys.modules
before = state()
for name in unmask.__all__:
    getattr(unmask, name)
unmask.load("tiny").generate("make 5 from 2 3 9", "eoser-ass", max_new_tokens=16)
from unmask.results import figures
assert state() == before, "used"
"""


def test_importing_and_using_it_changes_nothing_around_it() -> None:
    """``sys.path``, environment, warnings, loggers, progress bars and matplotlib's backend are the caller's."""
    subprocess.run([sys.executable, "-c", UNCHANGED], check=True)
