"""Running a study: ``unmask rl`` and ``unmask eval`` as commands of their own, resumable at any point.

The study's folder holds ``study.yaml``, ``cells.jsonl`` (a line a finished cell: all that the summary and the report read),
``runs.jsonl`` (a line a training), ``summary.json``, ``table.md``, and in ``jobs`` the run folders of every job and its log.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.study import Values
from benchmarks.study.config import StudyConfig
from benchmarks.study.grid import Cell, Job, read_grid
from benchmarks.study.lines import Lines, cell_lines, run_lines
from unmask.config import default_of, save_config
from unmask.errors import UserError
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.progress import Progress
from unmask.io.files import (
    folder_removed,
    read_json,
    read_lines,
    read_text,
    slug,
    write_json,
    write_text,
    writing_to,
)
from unmask.io.schema import METRICS, SUMMARY, TIMES
from unmask.rl.config import DiffusionGRPOConfig

ROOT = str(Path(__file__).parent.parent.parent)
"""Where ``benchmarks`` is, for the jobs."""


def study(config: StudyConfig, config_dir: Path, progress: Progress | None = None) -> Values:
    """Run or resume a study; returns its summary.

    Args:
        config_dir: the folder of the study's file.

    Raises:
        UserError: for anything wrong in the request, where the folder holds cells of another study, and where a job fails;
            what is finished stays.
    """
    from benchmarks.study.tables import markdown, read_out

    grid = read_grid(config, config_dir)
    output = Path(config.output)
    with writing_to(output, "output"):
        output.mkdir(parents=True, exist_ok=True)
    with _exclusive_lock(output):
        cells = Lines(output / "cells.jsonl", "cell", grid.labels, cell_lines)
        runs = Lines(output / "runs.jsonl", "train", grid.trainings, run_lines)
        waiting = [
            job
            for job in grid.jobs
            if any(c.key not in cells.lines for c in job.cells) or (job.training and job.name not in runs.lines)
        ]
        _check_problems(waiting)
        with writing_to(output, "output"):
            save_config(config, output / "study.yaml")
            cells.write()  # what is finished may have got another axis
            runs.write()
            if waiting:  # those there are of fewer cells
                for name in ("summary.json", "table.md"):
                    (output / name).unlink(missing_ok=True)
        _run(waiting, len(grid.jobs), config.jobs, cells, runs, progress)
        _check_consistent(grid.cells, cells)
        summary, tables = read_out(list(cells.lines.values()), config.compare, config.baselines, grid.tables)
        with writing_to(output, "output"):
            write_json(output / "summary.json", summary)
            write_text(output / "table.md", markdown(summary, tables))
    return summary


@contextmanager
def _exclusive_lock(output: Path) -> Iterator[None]:
    """Raises UserError where another process runs a study in this folder."""
    lock = FileLock(output / "lock", timeout=0)
    with writing_to(output, "output"):
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"another process runs a study in {output}: wait for it, or use another output") from None
        except NotImplementedError:
            raise UserError(f"cannot lock {output}: use an output on another file system") from None
    with lock:
        yield


def _check_problems(jobs: Sequence[Job]) -> None:
    """Raises UserError where a model or its problems cannot be loaded: now, not when a job's turn comes."""
    from unmask.models.load import load_meta
    from unmask.tasks import make_task

    seen: set[tuple[Any, ...]] = set()
    for evaluation, model in ((c.evaluation, j.training.model if j.training else None) for j in jobs for c in j.cells):
        source = (model or evaluation.model, evaluation.dtype, evaluation.revision)
        wanted = (*source, evaluation.task[0], evaluation.split, evaluation.limit, evaluation.seed)
        if wanted in seen or evaluation.trust_remote_code:
            continue
        seen.add(wanted)
        lm = load_meta(*source)
        make_task(evaluation.task[0], lm.task_defaults).problems(evaluation.split, evaluation.limit, evaluation.seed)


def _check_consistent(found: Sequence[Cell], cells: Lines) -> None:
    """Raises UserError where cells that should share their model or their problems do not."""
    seen: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for cell in found:
        line, e = cells.lines[cell.key], cell.evaluation
        model = (cell.training and cell.job, e.model, e.adapter, e.revision)
        problems = (e.task[0], e.split, e.limit, e.seed)
        for what, of, own in (
            ("weights", model, line["model"]["weights"]),
            ("problems", problems, line["problems"]),
        ):
            before, same = seen.setdefault((what, *of), (cell.key, own))
            if same != own:
                raise UserError(
                    f"cells {before} and {cell.key} were made with different {what}: something changed while the study ran; "
                    "choose another output"
                )


# ---- jobs ------------------------------------------------------------------------------------------------------------------


def _run(waiting: list[Job], total: int, at_once: int, cells: Lines, runs: Lines, progress: Progress | None) -> None:
    """The commands of the jobs, ``at_once`` of them at a time. Raises UserError where one fails; the others then end."""
    import torch

    output, done = cells.path.parent, total - len(waiting)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(i) for i in range(torch.cuda.device_count())] or [""]
    threads = str(max(1, torch.get_num_threads() // at_once))
    slots: dict[int, tuple[Job, Iterator[list[str]], subprocess.Popen[bytes]]] = {}
    try:
        while waiting or slots:
            for slot in range(at_once):
                if slot in slots:
                    job, commands, process = slots[slot]
                    if process.poll() is None:
                        continue
                    if not (output / "study.yaml").is_file():
                        raise folder_removed(output)
                    _check_end(job.name, process.returncode, output / "jobs" / job.name / "log.txt")
                elif waiting:
                    job = waiting.pop(0)
                    commands = _commands(job, output / "jobs" / job.name, cells, runs)
                    if progress:
                        progress("jobs", done, total)
                else:
                    continue
                with writing_to(output, "output"):
                    if command := next(commands, None):
                        chosen = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
                        slots[slot] = job, commands, _start(command, output / "jobs" / job.name, chosen)
                        continue
                slots.pop(slot, None)
                done += 1
                if progress:
                    progress("jobs", done, total)
            time.sleep(0.05)
    finally:
        for *_, process in slots.values():
            process.communicate()  # closes its input, which ends it


def _start(command: list[str], folder: Path, chosen: dict[str, str]) -> subprocess.Popen[bytes]:
    """A command of unmask; it and all that it starts are a process group, and what they print goes to log.txt."""
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.study.job", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                **chosen,
                "PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH")))),
            },
            start_new_session=True,
        )


def _check_end(name: str, code: int, log: Path) -> None:
    if not code:
        return
    said = read_text(log).rstrip().rpartition("\n")[2]
    if code == 2 and said.startswith("unmask: "):
        raise UserError(f"job {name}: {said.removeprefix('unmask: ')}")
    raise UserError(
        f"job {name} ended with exit code {code}: see {log}; what is finished is kept, and the same command resumes"
    )


def _commands(job: Job, folder: Path, cells: Lines, runs: Lines) -> Iterator[list[str]]:
    """The commands of a job that are still to run; what one has made is added to the lines before the next comes."""
    folder.mkdir(parents=True, exist_ok=True)
    final, budget = folder / "training" / "final", {}
    if job.training is not None:
        training = dataclasses.replace(job.training, output_dir=str(final.parent))
        save_config(training, folder / "training.yaml")
        if not final.is_dir():  # whole, if it is there
            yield ["rl", str(folder / "training.yaml")]
        from unmask.models.load import load_meta

        budget = training_budget(training, load_meta(str(final)).block_length)
        runs.add(job.name, {"budget": budget, **_training_line(training)})
    for run in dict.fromkeys(cell.run for cell in job.cells):
        own = [cell for cell in job.cells if cell.run == run and cell.key not in cells.lines]
        if not own:
            continue
        evaluation = dataclasses.replace(
            own[0].evaluation,
            output=str(folder / run),
            model=str(final) if job.training else own[0].evaluation.model,
            decoder=[cell.evaluation.decoder[0] for cell in own],
            batch_size=min(cell.evaluation.batch_size for cell in own),
        )
        yield ["eval", *_flags(evaluation)]
        for cell in own:
            cells.add(cell.key, _cell_line(cell, folder / run, budget))


def _flags(evaluation: EvalConfig) -> Iterator[str]:
    """The flags of ``unmask eval`` for everything that is not at its default."""
    for field in dataclasses.fields(evaluation):
        value, name = getattr(evaluation, field.name), field.name.replace("_", "-")
        if value == default_of(field):
            continue
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        else:
            yield from (f"--{name}", *map(str, value if isinstance(value, list) else [value]))


def _training_line(config: DiffusionGRPOConfig) -> Values:
    """What runs.jsonl says of a finished training. Its checkpoints, which only serve to resume, are removed."""
    from unmask.training.checkpoints import checkpoints

    folder = Path(config.output_dir)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    fix = f"remove {folder}, and it is trained again"
    times, metrics = (read_lines(folder / f"{n}.jsonl", s, fix) for n, s in (("times", TIMES), ("metrics", METRICS)))
    seconds = {k: round(sum(t.get(f"seconds_{k}", 0) for t in times), 3) for k in ("rollout", "update")}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "output_dir"}
    return {"settings": settings, "metrics": metrics, "seconds": seconds}


def training_budget(config: DiffusionGRPOConfig, block: int | None = None) -> dict[str, int]:
    """Updates, sampled completions, and the most forward passes of one row that sampling and updates together take: groups
    without variance are not computed, a threshold may need fewer steps, and validation is not counted.

    block: tokens of a block of a block-causal model, whose plan and views are those of its blocks.
    """
    from unmask.rl.dry_run import Work

    rollouts = math.ceil(config.max_steps / config.num_iterations)
    return {
        "updates": config.max_steps,
        "completions": rollouts * config.per_device_train_batch_size,
        "training_passes": Work.of(config, block).passes(config.max_steps, rollouts)
        * config.per_device_train_batch_size,
    }


def _cell_line(cell: Cell, folder: Path, budget: Values) -> Values:
    """What cells.jsonl says of a cell, from the run folder of its evaluation: one entry a problem, in their order.

    budget: that of its model's training.
    """
    from unmask.evaluation.records import read_records

    (task,), (decoder,) = cell.evaluation.task, cell.evaluation.decoder
    summary = read_json(folder / "summary.json", SUMMARY, f"remove {folder}, and it is evaluated again")
    found = next(entry for entry in summary["cells"] if entry["decoder"] == decoder)
    records = read_records(folder / "records" / f"{slug(task)}--{slug(decoder)}.jsonl")
    ids = hashlib.sha256("\n".join(str(r["id"]) for r in records).encode()).hexdigest()[:16]
    model = summary["config"]["model"]
    return {
        "budget": {"nfe": cell.decoder.within(model.get("block_length")).passes, **budget},
        "score_name": found["score_name"],
        "model": {"name": cell.evaluation.model, "weights": model["weights"], "dtype": model["dtype"]},
        "problems": ids,
        "solved": "".join("01"[bool(r["solved"])] for r in records),
        **{k: [r[k] for r in records] for k in ("points", "possible", "nfe", "length", "committed")},
        "seconds": round(found["seconds"], 3),
        "curves": found["curves"],
        "environment": summary["environment"],
    }
