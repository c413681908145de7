"""Running a study: jobs in processes of their own, their cells appended as they finish, resumable at any point.

The study's folder holds ``study.yaml``, ``cells.jsonl`` (a line a finished cell: all that the summary and the report read),
``runs.jsonl`` (a line a training), ``summary.json``, ``table.md``, and in ``jobs`` every job's configuration, records and log.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from unmask.config import save_config
from unmask.files import read_lines, whole, write_json, writing_to
from unmask.spec import UserError
from unmask.study.grid import Job, StudyConfig, Table, jobs_of, labels

_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
Progress = Callable[[int, int, list[str]], None]


# ---- one job, in its own process -------------------------------------------------------------------------------------------


def run_job(job: Job, folder: Path, done: set[str], report: Callable[[str, Table], None]) -> None:
    """Train and evaluate; every finished part is reported as ("run" or "cell", its line without its labels).

    Args:
        done: keys of cells that need not be evaluated again.
    """
    from unmask.evaluation.evaluate import EvalConfig, evaluate
    from unmask.evaluation.records import read_records
    from unmask.rl.run import train

    folder.mkdir(parents=True, exist_ok=True)
    model, budget = None, {}
    if job.training is not None:
        training = dataclasses.replace(job.training, output=str(folder / "training"))
        budget = training_budget(training)
        model = str(train(training))
        times = read_lines(folder / "training" / "times.jsonl")
        seconds = {k: round(sum(t[f"seconds_{k}"] for t in times), 3) for k in ("rollout", "update")}
        metrics = read_lines(folder / "training" / "metrics.jsonl")
        report("run", {"budget": budget, "metrics": metrics, "seconds": seconds})
    for cell in job.cells:
        if cell.key in done:
            continue
        output = folder / "evaluations" / cell.key
        config: EvalConfig = dataclasses.replace(
            cell.evaluation, output=str(output), model=model or cell.evaluation.model
        )
        summary = evaluate(config)
        records = [r for path in sorted((output / "records").glob("*.jsonl")) for r in read_records(path)]
        passes = cell.decoder.plan.steps * (2 if cell.decoder.cfg_scale else 1)
        report(
            "cell",
            {"key": cell.key, "budget": {"nfe": passes, **budget}, **compact(cell.evaluation.model, records, summary)},
        )
    for checkpoint in (folder / "training").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # for going on with the training only; ``final`` stays


def training_budget(config: Any) -> dict[str, int]:
    """Updates, sampled completions, and forward passes of one row in sampling and updates together."""
    from unmask.rl.plan import work_of

    rollouts = math.ceil(config.steps / config.num_iterations)
    return {
        "updates": config.steps,
        "rollouts": rollouts * config.batch_size,
        "training_passes": work_of(config).passes(config.steps, rollouts) * config.batch_size,
    }


def compact(model: str, records: list[Table], summary: Table) -> Table:
    """A cell's line from its records: one entry a problem, in the order of the problems."""
    (cell,) = summary["cells"]
    ids = hashlib.sha256("\n".join(str(r["id"]) for r in records).encode()).hexdigest()[:16]
    columns = {k: [r[k] for r in records] for k in ("points", "possible", "nfe", "length", "committed")}
    return {
        "score_name": cell["score_name"],
        "model": {"name": model, **{k: summary["config"]["model"][k] for k in ("weights", "dtype")}},
        "problems": ids,
        "solved": "".join("01"[bool(r["solved"])] for r in records),
        **columns,
        "seconds": round(cell["seconds"], 3),
        "curves": cell["curves"],
        "environment": summary["environment"],
    }


def _process(job: Job, folder: Path, done: set[str], threads: int, gpu: str | None, pipe: Connection) -> None:
    """A job's process: what it prints goes to log.txt, what it finds through the pipe; it ends when its parent does."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    lock = threading.Lock()

    def report(kind: str, line: Table) -> None:
        with lock:
            pipe.send((kind, line))

    try:
        run_job(job, folder, done, report)
    except UserError as error:
        report("error", {"says": str(error)})
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent(pipe: Connection) -> None:
    """The parent never sends: what ends the wait is its end."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)


# ---- the study -------------------------------------------------------------------------------------------------------------


class Lines:
    """A study's cells.jsonl or runs.jsonl: always whole, and in the order of the study, whatever is finished first."""

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        """Raises UserError where the file is damaged, or holds lines that the study does not name."""
        self.path, self.keys = path, keys
        try:
            self.lines = {line["key"]: line for line in read_lines(path)}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: remove it, and what it held is run again") from None
        if strangers := len(set(self.lines) - set(keys)):
            raise UserError(
                f"{path} holds {strangers} lines that this study does not name: give another output, or name them again"
            )

    def add(self, line: Table) -> None:
        self.lines[line["key"]] = line
        with whole(self.path) as partial:
            partial.write_text(_text([self.lines[k] for k in self.keys if k in self.lines]))


def _text(lines: list[Table]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)


def study(config: StudyConfig, beside: Path, progress: Progress | None = None) -> Table:
    """Run or go on with a study; returns its summary.

    Args:
        beside: the folder of the study's file. progress: called with (jobs done, jobs in all, names of those at work).

    Raises:
        UserError: for anything wrong in the request, where the folder holds cells of another study, and where a job fails;
            what is finished stays.
    """
    from unmask.study.summary import markdown, summarise_study

    jobs = jobs_of(config, beside)
    tables, axes = labels(jobs)
    for axis in config.compare:
        if axis not in axes:
            raise UserError(f"compare names {axis!r}, which does not vary: choose from {', '.join(axes)}")
    output = Path(config.output)
    keys = [c.key for job in jobs for c in job.cells]
    with writing_to(output, "output"):
        output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        cells = Lines(output / "cells.jsonl", keys)
        runs = Lines(output / "runs.jsonl", [job.name for job in jobs if job.training])
        with writing_to(output, "output"):
            save_config(config, output / "study.yaml")
        _run(jobs, config.jobs, output, cells, runs, tables, progress)
        summary = summarise_study([cells.lines[k] for k in keys], config.compare)
        with writing_to(output, "output"):
            write_json(output / "summary.json", summary)
            with whole(output / "table.md") as partial:
                partial.write_text(markdown(summary))
    return summary


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Raises UserError where another process runs a study in this folder."""
    with writing_to(output, "output"):
        file = (output / "lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process runs a study in {output}: wait for it, or give another output") from None
        yield


def _run(
    jobs: list[Job],
    at_once: int,
    output: Path,
    cells: Lines,
    runs: Lines,
    tables: dict[str, Table],
    progress: Progress | None,
) -> None:
    """All jobs that lack a cell, ``at_once`` of them at a time."""
    waiting = [job for job in jobs if any(c.key not in cells.lines for c in job.cells)]
    total, finished = len(jobs), len(jobs) - len(waiting)
    context: Any = multiprocessing.get_context(_START)
    context.set_forkserver_preload([__name__])  # imports once, not in every job
    threads = max(1, (os.cpu_count() or 1) // at_once)
    gpus = _gpus()
    slots: dict[int, tuple[Any, Connection, Job]] = {}
    try:
        while waiting or slots:
            for slot in set(range(at_once)) - set(slots):
                if not waiting:
                    break
                job = waiting.pop(0)
                ours, theirs = context.Pipe()
                folder, done = output / "jobs" / job.name, {c.key for c in job.cells if c.key in cells.lines}
                gpu = gpus[slot % len(gpus)] if gpus else None
                process = context.Process(target=_process, args=(job, folder, done, threads, gpu, theirs))
                process.start()
                theirs.close()
                slots[slot] = (process, ours, job)
            if progress:
                progress(finished, total, [job.name for _, _, job in slots.values()])
            ready = wait([pipe for _, pipe, _ in slots.values()])
            for slot, (process, pipe, job) in list(slots.items()):
                if pipe not in ready:
                    continue
                try:
                    kind, line = pipe.recv()
                except EOFError:
                    process.join()
                    del slots[slot]
                    _check_end(job, process.exitcode, output, cells)
                    finished += 1
                    continue
                if kind == "error":
                    raise UserError(f"job {job.name}: {line['says']}")
                with writing_to(output, "output"):
                    if kind == "cell":
                        cells.add({"cell": tables[line["key"]], **line})
                    elif job.name not in runs.lines:
                        trained = {k: v for k, v in tables[job.cells[0].key].items() if k.startswith("train.")}
                        runs.add({"key": job.name, "train": trained, **line})
        if progress:
            progress(finished, total, [])
    finally:
        for process, pipe, _ in slots.values():
            process.terminate()
            process.join()
            pipe.close()


def _check_end(job: Job, code: int | None, output: Path, cells: Lines) -> None:
    missing = [c.key for c in job.cells if c.key not in cells.lines]
    if code == 130:
        raise KeyboardInterrupt
    if code or missing:
        raise UserError(
            f"job {job.name} ended with exit code {code}: see {output / 'jobs' / job.name / 'log.txt'}; what is finished "
            "stays, and the same command goes on from there"
        )


def _gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]
