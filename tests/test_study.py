"""Studies: the grid by hand, killed and resumed = uninterrupted, the summary by hand, one sentence a mistake."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from conftest import toy
from unmask import decode, load, make_decoder, make_task
from unmask.cli import main
from unmask.config import read_config
from unmask.evaluation.curves import POSITION_BINS, TIME_BINS, curves
from unmask.evaluation.evaluate import EvalConfig, evaluate, task_prompts
from unmask.evaluation.records import read_records
from unmask.evaluation.statistics import Bootstrap, holm, paired_difference, wilson
from unmask.files import read_lines
from unmask.rl.run import RLConfig
from unmask.study.grid import StudyConfig, _key, jobs_of, labels
from unmask.study.run import compact, training_budget
from unmask.study.summary import Group, read_cells, summarise_study

ROOT = Path(__file__).parent.parent
TASKS = {"countdown": {"style": "compact", "max_value": 9}}
RL = {
    "tasks": ["countdown"],
    "steps": 1,
    "batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 16,
    "problems": 8,
    "validation_problems": 2,
    "bf16": False,
    "report_to": [],
    "learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    lm = toy(task_defaults=TASKS)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def write(folder: Path, **values: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "out"), **values}))
    return path


def cells_of(path: Path) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    jobs = jobs_of(read_config(StudyConfig, path), path.parent)
    tables, axes = labels(jobs)
    return [tables[c.key] for job in jobs for c in job.cells], axes


# ---- the grid --------------------------------------------------------------------------------------------------------------


def test_axes_are_multiplied_and_equal_cells_are_one(tmp_path: Path) -> None:
    tables = [
        {"task": ["sudoku", "countdown"], "decoder": ["full", "eoser"]},
        {"task": "countdown", "decoder": ["eoser", "full"], "gamma_min": [0.4, 0.1], "batch_size": 8},
    ]
    cells, axes = cells_of(write(tmp_path, evaluate=tables))
    names = [(c["task"], c["decoder"], c["gamma_min"]) for c in cells]
    # Countdown with gamma_min = 0.4, the default, stands in both tables.
    assert names == [
        *[("sudoku", "full", 0.4), ("sudoku", "eoser", 0.4), ("countdown", "full", 0.4), ("countdown", "eoser", 0.4)],
        *[("countdown", "eoser", 0.1), ("countdown", "full", 0.1)],
    ]
    assert axes == {"task": ["sudoku", "countdown"], "decoder": ["full", "eoser"], "gamma_min": [0.4, 0.1]}


def test_trainings_by_seed_each_evaluated_everywhere(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"output": "x", "learning_rate": 0.5, **RL}))
    train = [
        {"base": "base.yaml", "objective": ["cj", "one-step"], "seed": [0, 1]},
        {"base": "base.yaml", "objective": "cj", "seed": [0, 1], "tasks": [["countdown"], ["sudoku"]]},
    ]
    path = write(tmp_path, train=train, evaluate=[{"task": "countdown", "decoder": ["full", "ass"]}])
    jobs = jobs_of(read_config(StudyConfig, path), tmp_path)
    runs = [(j.training.seed, j.training.objective, j.training.tasks) for j in jobs if j.training]
    both = [("cj", ["countdown"]), ("one-step", ["countdown"]), ("cj", ["sudoku"])]
    assert runs == [(seed, *run) for seed in (0, 1) for run in both]
    assert all(j.training.learning_rate == 0.01 for j in jobs if j.training)
    cells, axes = cells_of(path)
    assert len(cells) == 2 + 6 * 2  # the model that no training has touched comes first
    assert cells[0]["train.objective"] is None and cells[1]["decoder"] == "ass"
    assert set(axes) == {"task", "decoder", "train.objective", "train.decoder", "train.seed", "train.tasks"}


def test_what_is_finished_survives_new_settings(tmp_path: Path) -> None:
    """A key says what differs from the defaults: a field that is added later changes none."""
    plain = jobs_of(StudyConfig("x", [{"task": "countdown", "decoder": "full"}]), tmp_path)
    said = jobs_of(StudyConfig("x", [{"task": "countdown", "decoder": "full", "cfg_scale": 0, "shots": 0}]), tmp_path)
    other = jobs_of(StudyConfig("x", [{"task": "countdown", "decoder": "full", "cfg_scale": 1}]), tmp_path)
    keys = [jobs[0].cells[0].key for jobs in (plain, said, other)]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] == _key({}, {"task": ["countdown"], "trajectories": True, "output": "none"}, {})


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "study").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_committed_studies_are_sound(path: Path) -> None:
    config = read_config(StudyConfig, path)
    jobs = jobs_of(config, path.parent)
    _, axes = labels(jobs)
    assert set(config.compare) <= set(axes) and jobs
    assert config.output == f"runs/study/{path.stem}"


MISTAKES = [
    ({"evaluate": []}, "at least one table"),
    ({"evaluate": [{"decodr": ["full"]}]}, "unknown key in evaluate 'decodr': did you mean 'decoder'"),
    ({"evaluate": [{"task": "countdwn"}]}, "unknown task 'countdwn'"),
    ({"evaluate": [{"decoder": ["fulll"]}]}, "unknown decoder 'fulll'"),
    ({"evaluate": [{"decoder": "full", "gamma_min": []}]}, "gamma_min is an empty list"),
    ({"evaluate": [{"decoder": "full", "gamma_min": [2]}]}, "gamma_min of decoder"),
    ({"evaluate": [{"output": "x"}]}, "unknown key in evaluate 'output'"),
    ({"evaluate": [{}], "train": [{"output": "x"}]}, "unknown key in train 'output'"),
    ({"evaluate": [{}], "train": [{"base": "none.yaml"}]}, "cannot read the config"),
    ({"evaluate": [{}], "train": [{"objective": "cj"}]}, "train lacks tasks"),
    ({"evaluate": [{"model": "tiny"}], "train": [{"tasks": ["countdown"]}]}, "names a model beside train"),
    ({"evaluate": [{"decoder": "ass"}], "compare": ["decodr"]}, "compare names 'decodr'"),
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


# ---- running ---------------------------------------------------------------------------------------------------------------


def without_times(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions."""
    aside = ("seconds", "environment")
    lines = [{k: v for k, v in c.items() if k not in aside} for c in read_cells(folder)]
    runs = [{k: v for k, v in r.items() if k not in aside} for r in read_lines(folder / "runs.jsonl")]
    summary = json.loads((folder / "summary.json").read_text())
    return {"cells": lines, "runs": runs, "summary": summary, "table": (folder / "table.md").read_text()}


def test_killed_twice_and_resumed_equals_uninterrupted(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {
        "train": [{**RL, "model": model, "objective": ["cj", "one-step"], "seed": [0, 1]}],
        "evaluate": [{"task": "countdown", "decoder": ["ass", "full:steps=4"], "limit": 5, "max_new_tokens": 16}],
        "jobs": 2,
    }
    whole, parts = write(tmp_path, **values), tmp_path / "parts"
    assert main(["study", str(whole)]) == 0
    command = [sys.executable, "-m", "unmask", "study", str(whole), "--output", str(parts)]
    for cells in (1, 5):  # kill -9 as soon as so many cells are finished
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(read_lines(parts / "cells.jsonl")) < cells:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(read_lines(parts / "cells.jsonl")) < 10
        with (parts / "cells.jsonl").open("a") as file:
            file.write('{"key": "cut o')
    subprocess.run(command, check=True, capture_output=True)
    found = without_times(parts)
    assert found == without_times(tmp_path / "out")
    assert len(found["cells"]) == 10 and len(found["runs"]) == 4
    assert not list(parts.glob("jobs/*/training/checkpoint-*")) and len(list(parts.glob("jobs/*/training/final"))) == 4
    # A line is its records, whatever made them.
    line = next(c for c in found["cells"] if c["cell"]["train.objective"] == "cj")
    records = next(parts.glob(f"jobs/*/evaluations/{line['key']}/records/*.jsonl"))
    assert line["length"] == [r["length"] for r in read_records(records)]
    # The same study again only prints; another one is refused, and so is a second one at the same time.
    assert main(["study", str(whole), "--jobs", "1"]) == 0
    other = write(tmp_path, evaluate=[{"task": "countdown", "decoder": "ass", "limit": 5, "max_new_tokens": 16}])
    assert main(["study", str(other)]) == 2 and "does not name" in capsys.readouterr().err
    with (parts / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["study", str(whole), "--output", str(parts)]) == 2
    assert "another process runs a study" in capsys.readouterr().err


def test_a_failing_job_is_named_and_the_rest_stays(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"task": "countdown", "decoder": "ass", "limit": 2, "max_new_tokens": 16}
    path = write(tmp_path, evaluate=[{**table, "model": model}, {**table, "model": str(tmp_path / "nowhere")}])
    assert main(["study", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "job countdown--" in said and "nowhere" in said
    assert len(read_cells(tmp_path / "out")) == 1


def test_training_budget_by_hand() -> None:
    values = {**RL, "output": "x", "steps": 6, "num_iterations": 2, "decoder": "full:steps=5", "beta": 0.1}
    cj = training_budget(RLConfig(**values, objective="cj"))  # type: ignore[arg-type]
    # 3 rollouts of 4 completions: 5 passes to sample, 5 for the reference; 6 updates of 5 views.
    assert cj == {"updates": 6, "rollouts": 12, "training_passes": 4 * (3 * (5 + 5) + 6 * 5)}
    one = training_budget(RLConfig(**values, objective="one-step"))  # type: ignore[arg-type]
    # One view; the old policy's probabilities are computed too, as the sampled ones belong to other views.
    assert one["training_passes"] == 4 * (3 * (5 + 1 + 1) + 6 * 1)


# ---- the summary -----------------------------------------------------------------------------------------------------------


def line(solved: str, seed: int = 0, problems: str = "p", **cell: Any) -> dict[str, Any]:
    n = len(solved)
    return {
        "key": f"{solved}{seed}{cell}",
        "cell": {"task": "t", "decoder": "a", **cell, "train.seed": seed},
        "problems": problems,
        "solved": solved,
        "points": [2.0 * (c == "1") for c in solved],
        "possible": [2] * n,
        "nfe": [7] * n,
        "committed": [14] * n,
        "length": list(range(n)),
        "budget": {"nfe": 7},
        "score_name": "s",
    }


def test_summary_by_hand() -> None:
    rng = np.random.default_rng(5)
    texts = ["".join(rng.choice(["0", "1"], 40, p=[0.6, 0.4])) for _ in range(4)]
    cells = [line(texts[i], seed=i % 2, decoder="ab"[i // 2]) for i in range(4)]
    summary = summarise_study(cells)
    first, second = summary["cells"]
    a, b = (np.array([[c == "1" for c in t] for t in pair], dtype=float) for pair in (texts[:2], texts[2:]))
    assert first["solved"] == a.mean() and second["score"] == b.mean() and first["seeds"] == 2
    assert first["nfe"] == 7 and first["tokens_per_forward"] == 2 and first["length"] == 19.5
    # A crossed bootstrap in plain loops: seeds and problems drawn, the same for both cells.
    draws = []
    for _ in range(4000):
        s, p = rng.integers(0, 2, 2), rng.integers(0, 40, 40)
        draws.append(b[s][:, p].mean() - a[s][:, p].mean())
    (difference,) = summary["differences"]
    assert difference["axis"] == "decoder" and difference["solved"] == pytest.approx(b.mean() - a.mean())
    assert difference["solved_interval"] == pytest.approx(list(np.quantile(draws, [0.025, 0.975])), abs=0.02)
    low, high = np.quantile(
        [a[rng.integers(0, 2, 2)][:, rng.integers(0, 40, 40)].mean() for _ in range(4000)], [0.025, 0.975]
    )
    assert first["solved_interval"] == pytest.approx([low, high], abs=0.02)
    assert difference["score_interval"] == difference["solved_interval"]


def test_seeds_with_other_problems_are_drawn_apart() -> None:
    """The same problems under two seeds are as uncertain as once; other problems are new evidence."""
    text = "01" * 50
    same = Group({}, [line(text, 0), line(text, 1)])
    other = Group({}, [line(text, 0, "p"), line(text, 1, "q")])
    once = Group({}, [line(text, 0)])
    spread = [float(np.std(Bootstrap().draws(*g.share("solved"), g.problems))) for g in (once, same, other)]
    assert spread[0] == pytest.approx(math.sqrt(0.25 / 100), rel=0.05)
    assert spread[1] == pytest.approx(spread[0], rel=0.03)
    first, second = Bootstrap(), Bootstrap()  # what a cell is given does not depend on the cells before it
    first.draws(*other.share("solved"), ("q", "p"))
    assert np.array_equal(first.draws(*once.share("solved"), ("p",)), second.draws(*once.share("solved"), ("p",)))
    assert spread[2] == pytest.approx(spread[0] * math.sqrt(0.75), rel=0.05)  # Var = (1/2 + 1/4) of one seed's


def test_cells_are_compared_with_equal_ones_alone() -> None:
    cells = [
        *[line("0011", decoder=d, gamma=g) for d in "ab" for g in (1, 2)],
        line("0011", problems="q", decoder="c", gamma=1),
    ]
    pairs = [(d["axis"], d["cell"]["decoder"], d["cell"]["gamma"]) for d in summarise_study(cells)["differences"]]
    assert pairs == [("decoder", "b", 1), ("decoder", "b", 2), ("gamma", "a", 2), ("gamma", "b", 2)]
    only = summarise_study(cells, ["gamma"])["differences"]
    assert {d["axis"] for d in only} == {"gamma"} and all(d["solved_p"] == 1 for d in only)


def test_one_seed_has_the_interval_of_an_evaluation() -> None:
    (cell,) = summarise_study([line("1111")])["cells"]
    assert cell["solved_interval"] == list(wilson(4, 4)) and cell["solved_interval"][0] < 0.6


def test_seeds_are_paired_by_name() -> None:
    """A study cut short: a has seeds 0 and 1, b has 1 and 2."""
    cells = [
        line("0000", 0, decoder="a"),
        line("0011", 1, decoder="a"),
        line("0111", 1, decoder="b"),
        line("1111", 2, decoder="b"),
    ]
    (difference,) = summarise_study(cells)["differences"]
    assert difference["solved"] == 0.25
    assert summarise_study([cells[0], cells[3]])["differences"] == []


def test_trained_models_stand_against_the_untrained_one() -> None:
    budget = {"nfe": 7, "updates": 1, "rollouts": 2, "training_passes": 3}
    base = {**line("0011"), "cell": {"task": "t", "decoder": "a", "train.objective": None, "train.seed": None}}
    trained = []
    for objective in ("cj", "diffu"):
        for seed in (0, 1):
            trained.append({**line("0111", seed, **{"train.objective": objective}), "budget": budget})
    summary = summarise_study([base, *trained])
    assert summary["axes"]["train.objective"] == ["cj", "diffu"]
    found = [(d["axis"], d["cell"]["train.objective"], d["solved"]) for d in summary["differences"]]
    assert found == [("train.objective", "diffu", 0.0), ("training", "cj", 0.25), ("training", "diffu", 0.25)]
    assert summary["budgets"] == {"updates": 1, "rollouts": 2, "training_passes": 3}


def test_holm_and_p_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == [] and holm([0.6, 0.9]) == [1.0, 1.0]
    assert Bootstrap.p(np.array([-1.0, 1.0, 1.0, 1.0])) == pytest.approx(2 * 2 / 5)
    assert Bootstrap.p(np.array([-1.0, -1.0, -1.0, 1.0])) == pytest.approx(2 * 2 / 5)
    assert Bootstrap.p(np.ones(99)) == pytest.approx(0.02) and Bootstrap.p(np.zeros(9)) == 1


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    a, b = [1.0, 0.0] * 100, [1.0, 0.0] * 95 + [0.0] * 10
    mean, (low, high) = paired_difference(a, b, [1.0] * 200)
    assert mean == pytest.approx(5 / 200) and 0 <= low < mean < high < 0.06


# ---- trajectories in records -----------------------------------------------------------------------------------------------


def test_records_keep_the_trajectory_that_decode_gives(model: str, tmp_path: Path) -> None:
    config = EvalConfig(
        model=model, task=["countdown"], decoder=["eoser:steps=4"], limit=6, max_new_tokens=16, trajectories=True,
        early_stop=False, output=str(tmp_path),
    )  # fmt: skip
    summary = evaluate(config)
    records = read_records(next((tmp_path / "records").iterdir()))
    lm, task = load(model), make_task("countdown", TASKS)
    ids, mask = lm.encode(task_prompts(lm, task, task.problems("test", 6)), 16)
    trajectory = decode(lm, ids, mask, make_decoder("eoser:steps=4", max_new_tokens=16))
    assert [r["tokens"] for r in records] == trajectory.tokens.tolist()
    assert [r["steps"] for r in records] == trajectory.step.tolist()
    assert torch.allclose(torch.tensor([r["logprobs"] for r in records]), trajectory.logprob, atol=1e-4)
    (cell,) = summary["cells"]
    ends = torch.isin(trajectory.tokens, torch.tensor(lm.end_ids))
    for s in range(4):
        now = trajectory.committed(s)
        assert cell["curves"]["commits"][s] == 4
        assert cell["curves"]["eos_share"][s] == pytest.approx(float((ends & now).sum() / now.sum()), abs=1e-6)
        for key, kind in (("end_confidence", ends), ("other_confidence", ~ends)):
            chosen = trajectory.logprob[now & kind].exp()
            expected = None if not len(chosen) else pytest.approx(float(chosen.mean()), abs=1e-4)
            assert cell["curves"][key][s] == expected
    made = compact("toy", records, summary)
    assert made["solved"] == "".join("01"[r["solved"]] for r in records) and made["curves"] == cell["curves"]


def test_order_by_hand() -> None:
    left_to_right = {"tokens": [5] * 32, "steps": [i // 2 for i in range(32)], "logprobs": [0.0] * 32}
    stopped = {"tokens": [5] * 32, "steps": [i // 2 if i < 16 else -1 for i in range(32)], "logprobs": [0.0] * 32}
    order = np.array(curves([left_to_right, stopped], [1], steps=16)["order"], dtype=float)
    assert order.shape == (TIME_BINS, POSITION_BINS)
    assert all(order[i // 2, i] == 1 for i in range(32)) and order.sum() == 32
    half = curves([stopped], [1], steps=16)
    assert half["order"][0][31] is None and half["commits"] == [2] * 8 and half["eos_share"] == [0] * 8
    ended = {"tokens": [5, 1, 1, 1], "steps": [0, 0, 1, 1], "logprobs": [0.0, math.log(0.5), math.log(0.25), 0.0]}
    found = curves([ended], [1], steps=2)
    assert found["eos_share"] == [0.5, 1] and found["end_confidence"] == [0.5, 0.625]
    assert found["other_confidence"] == [1, None] and found["commits"] == [2, 2]
    # A threshold's rows have their own clock: eight steps are the whole decode.
    own = np.array(curves([stopped], [1], steps=None)["order"], dtype=float)
    assert own[14, 15] == 1
    assert os.environ.get("RANK") is None
