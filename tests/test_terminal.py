"""What a command says, on terminals and pipes that do not take it: no traceback, and nothing is lost but what is said."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from unmask.cli import main
from unmask.evaluation import command, progress
from unmask.io.terminal import console, fitting_table

USAGE, MISTAKE, RESULT = ["--help"], ["evall→"], ["grade", "c.jsonl", "--task", "countdown"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    row = {"question": "q", "completion": "\\boxed{8*3+5}", "ground_truth": [[8, 3, 5], 29]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def run(arguments: list[str], folder: Path, encoding: str = "utf-8", **streams: Any) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in a process of its own."""
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": ""}  # the output is written at the end
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    command = [sys.executable, "-m", "unmask", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, text=True, encoding="latin-1", timeout=200, **streams)
    return done.returncode, done.stdout or "", done.stderr or ""


@pytest.mark.parametrize("arguments", [MISTAKE, RESULT])
def test_a_reader_that_has_gone_ends_a_command_silently(folder: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code, _, said = run(arguments, folder, stdout=writer, **({"stderr": writer} if arguments == MISTAKE else {}))
    os.close(writer)
    assert code == 1 and not said


@pytest.mark.parametrize(("arguments", "code"), [(USAGE, 0), (MISTAKE, 2), (RESULT, 0)])
def test_a_closed_output_changes_nothing(folder: Path, arguments: list[str], code: int) -> None:
    found, _, said = run(arguments, folder, stdout=None, preexec_fn=lambda: os.close(1))
    assert found == code and said.count("\n") == (code == 2) and "Traceback" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_one_sentence(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        code, _, said = run(USAGE, folder, stdout=full)
    assert code == 1 and said.startswith("unmask: cannot write the output: ") and said.count("\n") == 1


def test_what_a_terminal_cannot_show_is_escaped(folder: Path) -> None:
    code, out, err = run(USAGE, folder, "ascii")
    assert code == 0 and "\\u2026" in out and "Traceback" not in err
    for encoding in ("ascii", "gbk"):  # the second has the arrow
        code, _, err = run(MISTAKE, folder, encoding)
        assert code == 2 and "Traceback" not in err and ("\\u2192" in err) == (encoding == "ascii")


def test_a_console_shows_text_as_it_is() -> None:
    screen, text = console(), r"a[/]b [bold]x :smile: \[x] $_^ {a}"
    screen.file = io.StringIO()
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    screen.print(text)
    screen.print(table)
    assert screen.file.getvalue().count(text) == 4


NAME = "eoser-ass:blocks=4,temperature=0.7"


def screen(width: int) -> Console:
    return Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None, legacy_windows=False)


def shown(to: Console, *, of: str) -> str:
    """What a screen was given, and that ``of`` is there whole, folded or not."""
    text = to.file.getvalue()  # type: ignore[attr-defined]
    letters = iter("".join(text.split()))
    assert all(letter in letters for letter in of), f"{of} is cut in {text}"
    assert "…" not in text
    return text


@pytest.mark.parametrize("width", [30, 80, 132])
def test_a_table_drops_columns_and_cuts_no_name(width: int) -> None:
    to, dropped = screen(width), width < 132
    rows = [["countdown", NAME, "7", "12.9 [9.3, 17.5]", "20.1", "3.2"], ["sudoku", "full", "64", "1.0", "2.0", "3.0"]]
    headings = ["task", "decoder", "NFE", "solved", "length", "seconds"]
    to.print(fitting_table(to, "title", headings, rows, 2, ["seconds", "length"], [0]))
    text = shown(to, of=NAME)
    assert ("withoutseconds,length" in "".join(text.split())) == dropped != ("3.2" in text)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [40, 80])
def test_a_bar_leaves_room_for_its_name(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    to = screen(width)
    monkeypatch.setattr(progress, "console", lambda stderr: to)
    with progress.progress_bars() as report:
        report(f"countdown · {NAME}", 7, 256)
    assert "7/256" in shown(to, of=NAME)


def test_without_a_terminal_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bars() as report:
        for done in range(5):
            report("sudoku · full", done, 4)
    assert capsys.readouterr().err == "sudoku · full: 0 of 4\nsudoku · full: 4 of 4\n"


def test_the_demo_says_how_long_and_what_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "DECODERS", ["full:steps=2", "eoser-ass"])
    monkeypatch.setattr(command, "CANVASES", [("sudoku", "full:steps=32", 0.0), ("countdown", "full:steps=1", 0.0)])
    assert main(["demo", "--limit", "1", "--output", str(tmp_path / "demo")]) == 0
    said, progressed = capsys.readouterr()
    assert "minutes" in said.splitlines()[0]
    assert said.index("✓ solved") < said.index("✗ not solved") < said.index("to best")
    for cell in ("sudoku · full:steps=2", "countdown · eoser-ass"):  # no terminal: a line a part, and now and then
        assert f"{cell}: 0 of 1\n{cell}: 1 of 1\n" in progressed
    assert (tmp_path / "demo" / "accuracy.png").exists()
    assert "tiny-fast, test split, 1 problems a task" in said and (tmp_path / "demo" / "fast" / "accuracy.png").exists()
