"""Evaluation: resumed = uninterrupted = on several processes, intervals and curves by hand, what a folder refuses."""

from __future__ import annotations

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

from unmask import MaskedLM, UserError, decode, load, make_decoder, make_task
from unmask.evaluation.command import run_evaluation
from unmask.evaluation.distributed import take_own_gpu
from unmask.evaluation.evaluate import EvalConfig, evaluate, task_prompts
from unmask.evaluation.records import compare_to_best, curves, read_records
from unmask.io.files import read_lines
from unmask.results.statistics import pooled_bootstrap, wilson


def config(model: str, output: Path, **changes: object) -> EvalConfig:
    values = {"decoder": ["ass", "eoser-ass:temperature=1", "full-random:steps=4"]}
    values |= {"limit": 10, "max_new_tokens": 32, "batch_size": 4}
    return EvalConfig(model=model, output=str(output), **{**values, **changes})  # type: ignore[arg-type]


def records(output: Path) -> dict[str, list[dict[str, object]]]:
    """Every file of the folder's records, its lines in their order, without the time."""
    found = {p.name: read_lines(p) for p in sorted((output / "records").iterdir())}
    return {k: [{f: v for f, v in r.items() if f != "seconds"} for r in rows] for k, rows in found.items()}


def test_killed_and_resumed_in_other_batches_equals_uninterrupted(model: str, tmp_path: Path) -> None:
    whole = evaluate(config(model, tmp_path / "whole"))
    assert [r["index"] for r in next(iter(records(tmp_path / "whole").values()))] == list(range(10))
    seen: set[tuple[str, int]] = set()

    def stop(label: str, done: int, total: int) -> None:
        if done and (label, done) not in seen:  # killed after every batch
            seen.add((label, done))
            raise EOFError

    for _ in range(40):
        try:
            part = evaluate(config(model, tmp_path / "part", batch_size=7), stop)
            break
        except EOFError:
            with sorted((tmp_path / "part" / "records").iterdir())[-1].open("a") as file:
                file.write('{"index": 3, "id": "cut o')  # a crash in the middle of writing a line
    assert {done for _, done in seen} >= {10} and len({label for label, done in seen if done == 10}) == 6
    assert records(tmp_path / "whole") == records(tmp_path / "part")
    assert whole["config"] == {**part["config"], "batch_size": 4}
    for a, b in zip(whole["cells"], part["cells"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_a_folder_belongs_to_one_evaluation(model: str, tmp_path: Path) -> None:
    evaluate(config(model, tmp_path, decoder=["ass"], limit=4))
    first = records(tmp_path)
    evaluate(config(model, tmp_path, decoder=["ass"]))  # a raised limit adds problems
    before = records(tmp_path)
    assert {name: rows[:4] for name, rows in before.items()} == first
    with pytest.raises(UserError, match=r"other decoders, max_new_tokens: choose another --output"):
        evaluate(config(model, tmp_path, decoder=["ass"], max_new_tokens=16))
    grown = evaluate(config(model, tmp_path, decoder=["ass", "hybrid:block_length=8"]))  # another decoder may join
    assert len(grown["cells"]) == 4
    assert {k: v for k, v in records(tmp_path).items() if k in before} == before


def test_summary_holds_what_a_number_needs(model: str, tmp_path: Path) -> None:
    summary = evaluate(config(model, tmp_path, decoder=["ass", "eoser"]))
    run_evaluation(config(model, tmp_path, decoder=["ass", "eoser"]))
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert {"torch", "transformers", "commit", "processor", "threads"} <= set(summary["environment"])
    assert summary["config"]["tasks"]["countdown"]["max_value"] == 9
    assert summary["config"]["decoders"]["eoser"]["gamma_min"] == 0.4
    cell = summary["cells"][0]
    rows = records(tmp_path)["sudoku--ass.jsonl"]
    assert cell["solved"] == sum(bool(r["solved"]) for r in rows) / 10
    assert cell["nfe"] == 5 and cell["tokens_per_forward"] == 32 / 5
    assert {f.name for f in tmp_path.glob("*.[ps][nv]g")} == {"accuracy.png", "accuracy.svg"}
    assert (tmp_path / "table.md").read_text().count("\n") == 6


def test_cells_are_compared_with_the_best_on_the_same_problems() -> None:
    # fast is as good as slow in fewer passes: the best
    rows = [("a", "slow", 0.75, 64), ("a", "fast", 0.75, 7), ("a", "worse", 0.25, 7), ("b", "alone", 0, 7)]
    cells: list[dict[str, Any]] = [dict(zip(("task", "decoder", "solved", "nfe"), r, strict=True)) for r in rows]
    solved = [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    compare_to_best(cells, [[{"solved": s} for s in own] for own in solved])
    assert [c.get("to_best", {}).get("decoder") for c in cells] == ["fast", None, "fast", None]
    assert cells[0]["to_best"]["difference"] == 0 and cells[2]["to_best"]["difference"] == -0.5
    low, high = cells[2]["to_best"]["interval"]
    assert -1 <= low < -0.5 < high <= 0  # no problem is solved by the worse alone


def test_intervals_by_hand() -> None:
    # p = 0.5, n = 100, z = 1.96: centre (0.5 + 0.0192) / 1.0384 = 0.5, half = 0.0962.
    low, high = wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 300))
    low, high = pooled_bootstrap([1.0, 0.0] * 200, [1.0, 1.0] * 200)
    assert low == pytest.approx(0.45, abs=0.02) and high == pytest.approx(0.55, abs=0.02)
    assert pooled_bootstrap([3.0, 3.0], [4.0, 4.0]) == (0.75, 0.75)


def test_early_stop_changes_passes_alone_and_compilation_nothing(model: str, tmp_path: Path) -> None:
    settings = {"decoder": ["full", "semi-ar:block_length=8,temperature=1"], "task": ["countdown"]}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests
    for name in ("stops", "whole", "compiled"):
        evaluate(config(model, tmp_path / name, early_stop=name != "whole", compile=name == "compiled", **settings))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one shape
    assert records(tmp_path / "stops") == records(tmp_path / "compiled")
    for a, b in zip(*(records(tmp_path / name).values() for name in ("stops", "whole")), strict=True):
        cost = {"nfe": 0, "committed": 0}
        assert [{**r, **cost} for r in a] == [{**r, **cost} for r in b]
        assert all(x["nfe"] <= y["nfe"] == 16 for x, y in zip(a, b, strict=True))  # type: ignore[operator]


def test_worked_examples_stand_in_front(tiny_lm: MaskedLM, tmp_path: Path) -> None:
    task = make_task("countdown", tiny_lm.task_defaults)
    problems = task.problems("test", 2)
    plain, few = task_prompts(tiny_lm, task, problems), task_prompts(tiny_lm, task, problems, shots=2)
    shown = task.problems("train", 2)
    for prompt, longer in zip(plain, few, strict=True):
        assert longer.endswith(prompt) and longer.count("<|assistant|>") == 3
        assert all(str(e.response) in longer and task.instruction(e) in longer for e in shown)
    with pytest.raises(UserError, match="no worked responses"):
        task_prompts(tiny_lm, make_task("countdown:style=paper", {}), problems, shots=1)


def test_records_keep_the_trajectory_that_decode_gives(model: str, tmp_path: Path) -> None:
    settings = {"task": ["countdown"], "decoder": ["eoser:steps=4"], "limit": 6, "max_new_tokens": 16}
    summary = evaluate(config(model, tmp_path, **settings, trajectories=True, early_stop=False))
    kept = read_records(next((tmp_path / "records").iterdir()))
    lm = load(model)
    task = make_task("countdown", lm.task_defaults)
    ids, mask = lm.encode(task_prompts(lm, task, task.problems("test", 6)), 16)
    trajectory = decode(lm, ids, mask, make_decoder("eoser:steps=4", max_new_tokens=16))
    assert [r["tokens"] for r in kept] == trajectory.tokens.tolist()
    assert [r["steps"] for r in kept] == trajectory.step.tolist()
    assert torch.allclose(torch.tensor([r["logprobs"] for r in kept]), trajectory.logprob, atol=1e-4)
    (cell,) = summary["cells"]
    ends = torch.isin(trajectory.tokens, torch.tensor(lm.end_ids))
    for s in range(4):
        now = trajectory.committed(s)
        assert cell["curves"]["commits"][s] == 4
        assert cell["curves"]["eos_share"][s] == pytest.approx(float((ends & now).sum() / now.sum()), abs=1e-6)
        for key, kind in (("end_confidence", ends), ("other_confidence", ~ends)):
            chosen = trajectory.logprob[now & kind].exp()
            mean = pytest.approx(float(chosen.mean()), abs=1e-4) if len(chosen) else None
            assert cell["curves"][key][s] == mean


def test_order_by_hand() -> None:
    left_to_right = {"tokens": [5] * 32, "steps": [i // 2 for i in range(32)], "logprobs": [0.0] * 32}
    stopped = {**left_to_right, "steps": [i // 2 if i < 16 else -1 for i in range(32)]}
    order = np.array(curves([left_to_right, stopped], [1], steps=16)["order"], dtype=float)
    assert order.shape == (16, 32) and all(order[i // 2, i] == 1 for i in range(32)) and order.sum() == 32
    half = curves([stopped], [1], steps=16)
    assert half["order"][0][31] is None and half["commits"] == [2] * 8 and half["eos_share"] == [0] * 8
    ended = {"tokens": [5, 1, 1, 1], "steps": [0, 0, 1, 1], "logprobs": [0.0, math.log(0.5), math.log(0.25), 0.0]}
    found = curves([ended], [1], steps=2)
    assert found["eos_share"] == [0.5, 1] and found["end_confidence"] == [0.5, 0.625]
    assert found["other_confidence"] == [1, None] and found["commits"] == [2, 2]
    # A threshold's rows have their own clock: eight steps are the whole decode.
    own = np.array(curves([stopped], [1], steps=None)["order"], dtype=float)
    assert own[14, 15] == 1


SETTINGS = {"decoder": ["ass", "eoser-ass:temperature=1"], "limit": 11, "max_new_tokens": 32, "batch_size": 2}
FLAGS = ["--decoder", "ass", "eoser-ass:temperature=1", "--limit", "11", "--max-new-tokens", "32", "--batch-size", "2"]
# Runs the command line, with something done to this rank after every batch that is written.
WORKER = """
import os, signal, sys, time

from unmask import cli
from unmask.evaluation import evaluate as module

rank, mode = os.environ["RANK"], sys.argv[1]
run_cell, batches = module.run_cell, 0


def disturbed(*arguments):
    global batches
    for records in run_cell(*arguments):
        yield records
        batches += 1
        if mode == "dies" and rank == "1" and batches == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "slow":
            time.sleep(0.2)


module.run_cell = disturbed
sys.exit(cli.main([a.replace("RANK", rank) for a in sys.argv[2:]]))
"""


def start(model: str, output: Path, folder: Path, mode: str = "", launcher: str = "torchrun") -> subprocess.Popen[str]:
    """Two processes; ``mode`` runs them through WORKER."""
    if launcher == "accelerate":
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    else:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (folder / "worker.py").write_text(WORKER)
    script = [str(folder / "worker.py"), mode] if mode else ["-m", "unmask"]
    command = [sys.executable, *launch, *script, "eval", "--model", model, "--output", str(output), *FLAGS]
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, **streams)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one process writes."""
    output = tmp_path_factory.mktemp("alone")
    evaluate(config(model, output, **SETTINGS))
    return output


def test_two_processes_equal_one(alone: Path, model: str, tmp_path: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(config(model, tmp_path / "two", **SETTINGS), stop)  # one begins, two continue
    code, said = end(start(model, tmp_path / "two", tmp_path, launcher="accelerate"))
    assert code == 0, said
    assert records(tmp_path / "two") == records(alone) and len(records(alone)) == 4
    assert all([r["index"] for r in rows] == list(range(11)) for rows in records(alone).values())
    assert (tmp_path / "two" / "config.json").read_bytes() == (alone / "config.json").read_bytes()
    one, two = (json.loads((f / "summary.json").read_text()) for f in (alone, tmp_path / "two"))
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    for a, b in zip(one["cells"], two["cells"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    told = {line.rpartition(":")[0] for line in said.splitlines() if "process 1 of 2" in line}
    assert said.count("NFE") == 1 and len(told) == 4 and "process 2" not in said  # rank 0 alone speaks


def test_a_killed_rank_loses_one_batch_and_one_process_resumes(alone: Path, model: str, tmp_path: Path) -> None:
    code, said = end(start(model, tmp_path / "a", tmp_path, mode="dies"))
    assert code != 0, said
    shards = {p.name: p.read_text().splitlines() for p in (tmp_path / "a" / "records").iterdir()}
    assert all(".jsonl.rank-" in name for name in shards)
    lengths = sorted(len(lines) for name, lines in shards.items() if name.endswith("rank-1"))
    assert lengths == [2, 5]  # 3 batches, 1 batch
    evaluate(config(model, tmp_path / "a", **SETTINGS))
    assert records(tmp_path / "a") == records(alone)
    for name, lines in shards.items():  # kept as they are, times included: nothing was decoded twice
        written = (tmp_path / "a" / "records" / name.partition(".rank-")[0]).read_text().splitlines()
        assert set(lines) <= set(written)


def test_interrupting_the_launcher_leaves_a_folder_to_resume(alone: Path, model: str, tmp_path: Path) -> None:
    process = start(model, tmp_path / "run", tmp_path, mode="slow")
    deadline = time.time() + 200
    while len(list(tmp_path.glob("run/records/*.rank-*"))) < 2 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    code, said = end(process)
    assert code != 0 and said.count("interrupted; the same command resumes") == 1, said
    assert any(len(lines) < 11 for lines in records(tmp_path / "run").values())
    evaluate(config(model, tmp_path / "run", **SETTINGS))
    assert records(tmp_path / "run") == records(alone)


def test_a_mistake_ends_all_with_one_sentence(model: str, tmp_path: Path) -> None:
    begun = time.time()
    code, said = end(start(model, tmp_path / "run-RANK", tmp_path, mode="plain"))
    assert code != 0 and said.count("unmask: ") == said.count("choose an --output that they all share") == 1, said
    assert time.time() - begun < 200 and "terminate called" not in said
    assert not list(tmp_path.glob("run*/records/*"))


def test_each_process_has_its_own_gpu_as_long_as_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    for rank in ("1", "5"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        take_own_gpu()
    assert chosen == [1, 2]
