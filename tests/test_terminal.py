"""What a command says, on terminals and pipes that do not take it: no traceback, and nothing is lost but what is said."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from unmask.terminal import console

SAYS = {
    "usage": ["--help"],
    "flags": ["eval", "--help"],
    "mistake": ["evall→"],
    "result": ["grade", "c.jsonl", "--task", "countdown"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    row = {"question": "q", "completion": "\\boxed{8*3+5}", "ground_truth": [[8, 3, 5], 29]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def run(arguments: list[str], folder: Path, **streams: object) -> subprocess.Popen[str]:
    env = {**os.environ, **streams.pop("env", {})}  # type: ignore[dict-item]
    env.pop("PYTHONUNBUFFERED", None)  # the output is then written at the end, where an error is nobody's
    streams = {"stderr": subprocess.PIPE, **streams}
    command = [sys.executable, "-m", "unmask", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, encoding="latin-1", **streams)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", SAYS)
def test_a_reader_that_has_gone_ends_a_command_silently(folder: Path, name: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    whole = {"stdout": writer, **({"stderr": writer} if name == "mistake" else {})}
    process = run(SAYS[name], folder, **whole)
    os.close(writer)
    assert not process.communicate(timeout=60)[1]
    assert process.returncode == 1


@pytest.mark.parametrize("name", SAYS)
def test_a_closed_output_changes_nothing(folder: Path, name: str) -> None:
    process = run(SAYS[name], folder, preexec_fn=lambda: os.close(1))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == (2 if name == "mistake" else 0)
    assert said.count("\n") == (1 if name == "mistake" else 0) and "Traceback" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_one_sentence(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        process = run(SAYS["usage"], folder, stdout=full)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and said.startswith("unmask: cannot write the output: ") and said.count("\n") == 1


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "gbk"])
@pytest.mark.parametrize("name", ["usage", "mistake"])
def test_what_a_terminal_cannot_show_is_escaped(folder: Path, name: str, encoding: str) -> None:
    process = run(SAYS[name], folder, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding})
    out, err = process.communicate(timeout=60)
    assert process.returncode == (2 if name == "mistake" else 0) and "Traceback" not in err
    if encoding != "gbk":  # which has both
        assert ("\\u2026" in out) if name == "usage" else ("\\u2192" in err)


@pytest.mark.parametrize("text", ["a[/]b", "[bold]x", ":smile:", r"\[x]", "$_^", "{a}"])
def test_a_console_shows_text_as_it_is(text: str) -> None:
    screen = console()
    screen.file = io.StringIO()
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    screen.print(text)
    screen.print(table)
    assert screen.file.getvalue().count(text) == 4
