"""Evaluation on several processes equals one process, record for record; what is killed goes on on any number of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unmask.evaluation.distributed import take_own_gpu
from unmask.evaluation.evaluate import EvalConfig, evaluate
from unmask.io.files import read_lines
from unmask.io.store import Record

SETTINGS = {
    "task": ["countdown:style=compact,max_value=9", "sudoku:style=compact"],
    "decoder": ["ass", "eoser-ass:temperature=1"],
    "limit": [11],
    "max-new-tokens": [32],
    "batch-size": [2],
}
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


def config(model: str, output: Path, **changes: object) -> EvalConfig:
    values = {k.replace("-", "_"): v if k in ("task", "decoder") else v[0] for k, v in SETTINGS.items()}
    return EvalConfig(**{**values, "model": model, "output": str(output), **changes})  # type: ignore[arg-type]


def start(model: str, output: Path, folder: Path, mode: str = "", launcher: str = "torchrun") -> subprocess.Popen[str]:
    """Two processes; ``mode`` runs them through WORKER."""
    if launcher == "accelerate":
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    else:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (folder / "worker.py").write_text(WORKER)
    script = [str(folder / "worker.py"), mode] if mode else ["-m", "unmask"]
    settings = [text for k, v in SETTINGS.items() for text in (f"--{k}", *map(str, v))]
    return subprocess.Popen(
        [sys.executable, *launch, *script, "eval", "--model", model, "--output", str(output), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def records(output: Path) -> dict[str, list[Record]]:
    """Every file of the folder's records, its lines in their order, without the time."""
    found = {p.name: read_lines(p) for p in sorted((output / "records").iterdir())}
    return {name: [{k: v for k, v in r.items() if k != "seconds"} for r in lines] for name, lines in found.items()}


@pytest.fixture(scope="module")
def alone(toy_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one process writes."""
    output = tmp_path_factory.mktemp("alone")
    evaluate(config(toy_folder, output))
    return output


def test_two_processes_equal_one(alone: Path, toy_folder: str, tmp_path: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(config(toy_folder, tmp_path / "two"), stop)  # one begins, two go on
    code, said = end(start(toy_folder, tmp_path / "two", tmp_path, launcher="accelerate"))
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


def test_a_killed_rank_loses_one_batch_and_one_process_goes_on(alone: Path, toy_folder: str, tmp_path: Path) -> None:
    code, said = end(start(toy_folder, tmp_path / "a", tmp_path, mode="dies"))
    assert code != 0, said
    shards = {p.name: p.read_text().splitlines() for p in (tmp_path / "a" / "records").iterdir()}
    assert all(".jsonl.rank-" in name for name in shards)
    lengths = sorted(len(lines) for name, lines in shards.items() if name.endswith("rank-1"))
    assert lengths == [2, 5]  # 3 batches, 1 batch
    evaluate(config(toy_folder, tmp_path / "a"))
    assert records(tmp_path / "a") == records(alone)
    for name, lines in shards.items():  # kept as they are, times included: nothing was decoded twice
        written = (tmp_path / "a" / "records" / name.partition(".rank-")[0]).read_text().splitlines()
        assert set(lines) <= set(written)


def test_interrupting_the_launcher_leaves_a_folder_to_go_on_with(alone: Path, toy_folder: str, tmp_path: Path) -> None:
    process = start(toy_folder, tmp_path / "run", tmp_path, mode="slow")
    deadline = time.time() + 200
    while len(list(tmp_path.glob("run/records/*.rank-*"))) < 2 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    code, said = end(process)
    assert code != 0 and said.count("the same command resumes") == 1, said
    assert any(len(lines) < 11 for lines in records(tmp_path / "run").values())
    evaluate(config(toy_folder, tmp_path / "run"))
    assert records(tmp_path / "run") == records(alone)


def test_a_mistake_ends_all_with_one_sentence(toy_folder: str, tmp_path: Path) -> None:
    said = "choose an --output that they all share"
    begun = time.time()
    code, text = end(start(toy_folder, tmp_path / "run-RANK", tmp_path, mode="plain"))
    assert code != 0 and text.count("unmask: ") == text.count(said) == 1, text
    assert time.time() - begun < 200 and "terminate called" not in text
    assert not list(tmp_path.glob("run*/records/*"))


@pytest.mark.parametrize(("rank", "gpu"), [(1, 1), (5, 2)])
def test_each_process_has_its_own_gpu_as_long_as_there_are_enough(
    rank: int, gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    take_own_gpu()
    assert chosen == [gpu]
