"""Studies: the grid by hand, killed and resumed = uninterrupted, the summary by hand, one sentence a mistake."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.__main__ import main
from benchmarks.study.config import StudyConfig
from benchmarks.study.grid import Grid, read_grid
from benchmarks.study.lines import read_cells
from benchmarks.study.run import training_budget
from unmask import Decoder, DiffusionGRPOConfig
from unmask.config import read_config
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.records import read_records
from unmask.io.files import read_lines
from unmask.tasks.countdown import Countdown

ROOT = Path(__file__).parent.parent
RL = {"tasks": ["countdown"], "problems": 8, "validation_problems": 2, "max_steps": 1, "learning_rate": 0.01}
RL |= {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 16}
RL |= {"bf16": False, "report_to": []}


def write(folder: Path, **values: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "out"), **values}))
    return path


def grid_of(path: Path) -> Grid:
    return read_grid(read_config(StudyConfig, path), path.parent)


def test_axes_are_multiplied_and_equal_cells_are_one(tmp_path: Path) -> None:
    tables = [
        {"task": ["sudoku", "countdown"], "decoder": ["full", "eoser"]},
        {"task": "countdown", "decoder": ["eoser", "full"], "gamma_min": [0.4, 0.1], "batch_size": 8},
    ]
    grid = grid_of(write(tmp_path, evaluate=tables))
    names = [" ".join(map(str, (c["task"], c["decoder"], c["gamma_min"]))) for c in grid.labels.values()]
    # Countdown with gamma_min = 0.4, the default, is in both tables.
    assert names[:4] == ["sudoku full 0.4", "sudoku eoser 0.4", "countdown full 0.4", "countdown eoser 0.4"]
    assert names[4:] == ["countdown eoser 0.1", "countdown full 0.1"]
    assert grid.axes == {"task": ["sudoku", "countdown"], "decoder": ["full", "eoser"], "gamma_min": [0.4, 0.1]}
    assert [len(job.cells) for job in grid.jobs] == [2, 4]  # all decoders of a task in one


def test_trainings_by_seed_each_evaluated_everywhere(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"output_dir": "x", "learning_rate": 0.5, **RL}))
    train = [
        {"base": "base.yaml", "objective": ["cj", "one-step"], "seed": [0, 1]},
        {"base": "base.yaml", "objective": "cj", "seed": [0, 1], "tasks": [["countdown"], ["sudoku"]]},
    ]
    path = write(tmp_path, train=train, evaluate=[{"task": "countdown", "decoder": ["full", "ass"]}])
    grid = grid_of(path)
    trainings = [job.training for job in grid.jobs if job.training]
    runs = [(t.seed, t.objective, t.tasks) for t in trainings]
    both = [("cj", ["countdown"]), ("one-step", ["countdown"]), ("cj", ["sudoku"])]
    assert runs == [(seed, *run) for seed in (0, 1) for run in both]
    assert all(t.learning_rate == 0.01 for t in trainings)
    cells = list(grid.labels.values())
    assert len(cells) == 2 + 6 * 2  # the model that no training has touched comes first
    assert cells[0]["train.objective"] is None and cells[1]["decoder"] == "ass"
    assert set(grid.axes) == {"task", "decoder", "train.objective", "train.decoder", "train.seed", "train.tasks"}


def test_settings_and_not_their_names_make_a_cell(tmp_path: Path) -> None:
    plain, said, other = (
        read_grid(StudyConfig("x", [{"task": "countdown", "decoder": "full", **more}]), tmp_path).cells[0].key
        for more in ({}, {"cfg_scale": 0, "shots": 0, "batch_size": 3}, {"cfg_scale": 1})
    )
    assert plain == said != other


def test_a_default_that_changes_accepts_no_old_cell(tmp_path: Path) -> None:
    path = write(tmp_path, train=[RL], evaluate=[{"task": "countdown", "decoder": "full"}])
    before = grid_of(path).cells
    evaluated = [(EvalConfig, "early_stop", False), (Decoder, "eos_tokens", "eos+eot"), (Countdown, "numbers", 4)]
    for kind, name, value in (*evaluated, (DiffusionGRPOConfig, "beta", 0.1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "__init__", partialmethod(kind.__init__, **{name: value}))
            after = grid_of(path).cells
        only_trained = kind is DiffusionGRPOConfig
        assert [old.key == new.key for old, new in zip(before, after, strict=True)] == [only_trained, False]
        assert before[1].job != after[1].job or not only_trained  # and a training is not taken for the old one


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "study").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_committed_studies_are_sound(path: Path) -> None:
    config = read_config(StudyConfig, path)
    assert read_grid(config, path.parent).jobs and config.output == f"runs/study/{path.stem}"


MISTAKES = [
    ({"evaluate": []}, "at least one table"),
    ({"evaluate": [{"decodr": ["full"]}]}, "unknown key in evaluate 'decodr': did you mean 'decoder'"),
    ({"evaluate": [{"task": "countdwn"}]}, "unknown task 'countdwn'"),
    ({"evaluate": [{"decoder": ["fulll"]}]}, "unknown decoder 'fulll'"),
    ({"evaluate": [{"decoder": "full", "gamma_min": []}]}, "gamma_min is an empty list"),
    ({"evaluate": [{"decoder": "full", "gamma_min": [2]}]}, "gamma_min of decoder"),
    ({"evaluate": [{"output": "x"}]}, "unknown key in evaluate 'output'"),
    ({"evaluate": [{}], "train": [{"output_dir": "x"}]}, "unknown key in train 'output_dir'"),
    ({"evaluate": [{}], "train": [{"base": "none.yaml"}]}, "cannot read the config"),
    ({"evaluate": [{}], "train": [{"objective": "cj"}]}, "train lacks tasks"),
    ({"evaluate": [{"model": "tiny"}], "train": [{"tasks": ["countdown"]}]}, "names a model beside train"),
    ({"evaluate": [{"decoder": "ass"}], "compare": ["decodr"]}, "compare names 'decodr'"),
    ({"evaluate": [{"decoder": ["ass", "full"]}], "baselines": ["eoser"]}, "unknown decoder of baselines 'eoser'"),
    ({"evaluate": [{}], "train": [{**RL, "model": ["a", "b"]}]}, "train starts from a and b"),
    ({"evaluate": [{"seed": [0, 1]}], "train": [RL]}, "evaluate varies the seed beside train"),
    ({"evaluate": [{}], "train": [{**RL, "per_device_train_batch_size": 5}]}, "num_generations"),
    ({"evaluate": [{"decoder": "ass"}], "jobs": 0}, "jobs is 0"),
    ({"evaluate": [{"decoder": "ass"}], "output": "."}, "output is '.'"),
]


@pytest.mark.parametrize(("values", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_one_sentence(
    values: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, **values)
    assert main(["study", str(path)]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "out").exists()


def without_times(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions."""
    aside = ("seconds", "environment")
    lines = [{k: v for k, v in c.items() if k not in aside} for c in read_cells(folder)]
    runs = [{k: v for k, v in r.items() if k not in aside} for r in read_lines(folder / "runs.jsonl")]
    summary = json.loads((folder / "summary.json").read_text())
    return {"cells": lines, "runs": runs, "summary": summary, "table": (folder / "table.md").read_text()}


def test_killed_and_resumed_equals_uninterrupted_and_grows(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {
        "train": [{**RL, "model": model}],
        "evaluate": [{"task": "countdown", "decoder": ["ass", "full:steps=4"], "limit": 5, "max_new_tokens": 16}],
    }
    whole, parts = write(tmp_path, **values), tmp_path / "parts"
    assert main(["study", str(whole)]) == 0
    command = [sys.executable, "-m", "benchmarks", "study", str(whole), "--output", str(parts), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not read_lines(parts / "cells.jsonl"):  # kill -9 as soon as a cell is finished
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read_lines(parts / "cells.jsonl")) < 4
    with (parts / "cells.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    subprocess.run(command, check=True, capture_output=True)
    found = without_times(parts)
    assert found == without_times(tmp_path / "out")
    assert len(found["cells"]) == 4 and len(found["runs"]) == 1
    assert not list(parts.glob("jobs/*/training/checkpoint-*")) and list(parts.glob("jobs/*/training/final"))
    # A line is its records, whatever made them.
    line = next(c for c in found["cells"] if c["cell"]["train.objective"] == "cj")
    records = next(parts.glob("jobs/cj*/*/records/countdown--ass.jsonl"))
    assert line["cell"]["decoder"] == "ass" and line["length"] == [r["length"] for r in read_records(records)]
    # The same study again only prints; another one is refused, and so is a second one at the same time.
    assert main(["study", str(whole)]) == 0
    other = write(tmp_path, evaluate=[{"task": "countdown", "decoder": "ass", "limit": 5, "max_new_tokens": 16}])
    assert main(["study", str(other)]) == 2 and "does not name" in capsys.readouterr().err
    with (parts / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command[3:]) == 2
    assert "another process runs a study" in capsys.readouterr().err
    # It grows: a cell and a new axis join; what is finished is neither trained nor evaluated again.
    (table,) = values["evaluate"]
    more = {**table, "decoder": "ass", "gamma_min": 0.1}
    write(tmp_path, train=values["train"], evaluate=[more, table])
    before = {c["key"]: c["seconds"] for c in read_cells(tmp_path / "out")}
    made = next((tmp_path / "out").glob("jobs/*/training/final/model.safetensors")).stat().st_mtime_ns
    assert main(["study", str(whole)]) == 0
    after = read_cells(tmp_path / "out")
    assert next((tmp_path / "out").glob("jobs/*/training/final/model.safetensors")).stat().st_mtime_ns == made
    assert {c["key"]: c["seconds"] for c in after if c["key"] in before} == before
    joined = [(c["cell"]["decoder"], c["cell"]["gamma_min"]) for c in after[3:]]
    assert joined == [("ass", 0.1), ("ass", 0.4), ("full:steps=4", 0.4)]
    # Other weights under the same name are noticed.
    changed = [{**c, "model": {**c["model"], "weights": "other"}} if i == 4 else c for i, c in enumerate(after)]
    (tmp_path / "out" / "cells.jsonl").write_text("".join(json.dumps(c) + "\n" for c in changed))
    assert main(["study", str(whole)]) == 2 and "different weights" in capsys.readouterr().err


STAYS = """
import pathlib, subprocess
from unmask.tasks.countdown import Countdown

class Stays(Countdown):
    def grade(self, *_, **__):
        subprocess.Popen(["sleep", "1000"])
        pathlib.Path(__file__).with_name("busy").touch()
        while True:
            pass
"""


def processes_of(marker: str) -> list[str]:
    """The processes that have it in their environment, by name."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if marker.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's table of processes")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])  # SIGTERM ends a study as SIGKILL does
def test_nothing_outlives_a_study(number: signal.Signals, model: str, tmp_path: Path) -> None:
    """Neither a job, busy for ever, nor what it started."""
    (tmp_path / "stays.py").write_text(STAYS)
    path = write(tmp_path, evaluate=[{"task": "stays:Stays", "decoder": "ass", "limit": 1, "model": model}])
    command = [sys.executable, "-m", "benchmarks", "study", str(path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))}
    usual = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background shell ignores it
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=usual)
    while not (tmp_path / "busy").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert any("sleep" in name for name in processes_of(str(tmp_path)))
    process.send_signal(number)
    said = process.communicate(timeout=200)[1]
    assert "Traceback" not in said and (number != signal.SIGINT or process.returncode == 130)
    deadline = time.time() + 60
    while left := processes_of(str(tmp_path)):
        assert time.time() < deadline, left
        time.sleep(0.05)


def test_what_cannot_be_had_is_said_first_and_a_failing_job_is_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"task": "countdown", "decoder": "ass", "limit": 2, "max_new_tokens": 16, "model": model}
    for values in ({"model": "no-such-folder"}, {"split": "tset"}):
        assert main(["study", str(write(tmp_path, evaluate=[{**table, **values}]))]) == 2
        assert next(iter(values.values())) in capsys.readouterr().err and not (tmp_path / "out" / "jobs").exists()
    path = write(tmp_path, evaluate=[table, {**table, "shots": 60}])  # examples that the model has no room for
    assert main(["study", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "job countdown--" in said and "shorten the prompt" in said
    assert len(read_cells(tmp_path / "out")) == 1  # that of the other job


def test_training_budget_by_hand() -> None:
    values = {**RL, "output_dir": "x", "max_steps": 6, "num_iterations": 2, "decoder": "full:steps=5", "beta": 0.1}
    changes = ({"objective": "cj"}, {"objective": "one-step"}, {"objective": "cj", "old_logprobs": "recomputed"})
    cj, one, anew = (training_budget(DiffusionGRPOConfig(**values, **change)) for change in changes)  # type: ignore[arg-type]
    # 3 rollouts of 4 completions: 5 passes to sample, 5 for the reference; 6 updates of 5 views.
    assert cj == {"updates": 6, "completions": 12, "training_passes": 4 * (3 * (5 + 5) + 6 * 5)}
    # One view; the old policy's probabilities are computed too, as the sampled ones belong to other views.
    assert one["training_passes"] == 4 * (3 * (5 + 1 + 1) + 6 * 1)
    assert anew["training_passes"] == 4 * (3 * (5 + 5 + 5) + 6 * 5)
    # In blocks of 8 a canvas of 16 takes ascending steps of 1, 2 and 5 tokens twice, which are three views.
    in_blocks = DiffusionGRPOConfig(**{**values, "decoder": "ass", "max_completion_length": 16, "beta": 0.0})  # type: ignore[arg-type]
    assert training_budget(in_blocks, 8)["training_passes"] == 4 * (3 * 6 + 6 * 3)
