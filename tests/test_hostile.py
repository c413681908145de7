"""Commands whose folder, standard output or home folder is taken away: one sentence and no traceback, or no difference."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.__main__ import main as benchmark
from benchmarks.study import run as study
from unmask.cli import main
from unmask.evaluation import evaluate, tune
from unmask.results import style

Command = Callable[[str], list[str]]
TABLE = {"task": "countdown", "decoder": "ass", "limit": 2, "max_new_tokens": 16}
FLAGS = [f"--{key.replace('_', '-')}={value}" for key, value in TABLE.items()]


@pytest.fixture
def command(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The shortest run of a command that writes ``out``."""
    of_tune = shlex.split("--budget=4 --max-new-tokens=32 --task=countdown --limit=2 --run-off-limit=2 --test-limit=2")
    few = (["ass", "full:steps=4", "eoser"], ["semi-ar:steps=4", "ass:temperature=0.5"])
    monkeypatch.setattr(tune, "candidates", lambda *_: few)
    tables = [{**TABLE, "model": model}]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "evaluate": tables}))
    known = {
        "eval": [f"--model={model}", f"--output={tmp_path / 'out'}", *FLAGS],
        "tune": [f"--model={model}", f"--output={tmp_path / 'out'}", *of_tune],
        "study": [str(tmp_path / "study.yaml")],
    }
    return lambda name: [name, *known[name]]


MOMENTS = [
    ("eval", evaluate, "kept_trajectories", "was removed while the run wrote to it"),
    ("eval", style, "atomic_write", "cannot write to"),
    ("tune", tune, "run_cell", "cannot write to"),
    ("study", study.time, "sleep", "was removed while the run wrote to it"),
]


@pytest.mark.parametrize("case", MOMENTS)
def test_a_folder_removed_meanwhile_is_one_sentence(
    case: Any, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, place, moment, says = case
    usual = getattr(place, moment)

    def without_folder(*arguments: Any) -> Any:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return usual(*arguments)

    monkeypatch.setattr(place, moment, without_folder)
    start = benchmark if name == "study" else main
    assert start(command(name) + ["--batch-size=1", "--trajectories"] * (moment == "kept_trajectories")) == 2
    said = capsys.readouterr().err
    assert f"unmask: {tmp_path / 'out'} {says}" in said or f"unmask: {says} {tmp_path / 'out'}" in said


@pytest.mark.parametrize("name", ["eval", "tune", "study"])
def test_a_lost_output_loses_no_result(
    name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = name == "study"  # None in place of a stream that breaks
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(os.fdopen(writer, "wb")) as stream:
        monkeypatch.setattr(sys, "stdout", None if closed else stream)
        if closed:
            assert benchmark(command(name)) == 0
        else:
            with pytest.raises(SystemExit) as end:
                main(command(name))
            assert end.value.code == 1
    assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "out" / ("front.json" if name == "tune" else "summary.json")).is_file()


def test_a_home_that_cannot_be_written_changes_nothing(command: Command, tmp_path: Path) -> None:
    (tmp_path / "home").touch()  # a file
    homes = {"HOME": "", "XDG_CACHE_HOME": "cache", "HF_HOME": "hf", "MPLCONFIGDIR": "figures"}
    env = {**os.environ, **{name: str(tmp_path / "home" / inside) for name, inside in homes.items()}}
    done = subprocess.run([sys.executable, "-m", "unmask", *command("eval")], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "accuracy.png").is_file()


def test_a_cache_that_torch_cannot_make_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert main(["generate", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"unmask: cannot write to {tmp_path}/file/cache: Not a directory") and said.count("\n") == 1
