"""Running a study: jobs in processes of their own, their cells appended as they finish, resumable at any point.

The study's folder holds ``study.yaml``, ``cells.jsonl`` (a line a finished cell: all that the summary and the report read),
``runs.jsonl`` (a line a training), ``summary.json``, ``table.md``, and in ``jobs`` every job's configuration, records and log.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from unmask.config import save_config
from unmask.errors import UserError
from unmask.io.files import atomic_write, read_lines, removed, write_json, write_text, writing_to
from unmask.io.schema import METRICS, TIMES
from unmask.results.pivot import Values, pivots
from unmask.study.grid import Job, StudyConfig, check_compared, jobs_of, labels, settings_of, training_labels

if TYPE_CHECKING:
    from unmask.rl.config import DiffusionGRPOConfig

_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
Progress = Callable[[int, int, list[str]], None]


# ---- one job, in its own process -------------------------------------------------------------------------------------------


def run_job(job: Job, folder: Path, done: set[str], report: Callable[[str, Values], None]) -> None:
    """Train and evaluate; every finished part is reported as ("run" or "cell", its line without its labels).

    Args:
        done: keys of cells that need not be evaluated again.
    """
    from unmask.evaluation.config import EvalConfig
    from unmask.evaluation.evaluate import evaluate
    from unmask.evaluation.records import read_records
    from unmask.io.files import slug

    model, budget = None, {}
    if job.training is not None:
        budget = training_budget(job.training)
        model, line = _trained(job.training, folder / "training")
        report("run", {"budget": budget, **line})
    for cell in job.cells:
        if cell.key in done:
            continue
        output = folder / "evaluations" / cell.key
        config: EvalConfig = dataclasses.replace(
            cell.evaluation, output=str(output), model=model or cell.evaluation.model
        )
        summary = evaluate(config)
        records = read_records(output / "records" / f"{slug(config.task[0])}--{slug(config.decoder[0])}.jsonl")
        found = compact(cell.evaluation.model, records, summary)
        report("cell", {"key": cell.key, "budget": {"nfe": cell.decoder.passes, **budget}, **found})


def _trained(config: DiffusionGRPOConfig, folder: Path) -> tuple[str, Values]:
    """The trained checkpoint, made now or before, and the line of its training. What only serves to go on is removed."""
    from unmask.rl.run import train
    from unmask.training.checkpoints import checkpoints

    final = folder / "final"  # whole, if it is there
    if not final.is_dir():
        train(dataclasses.replace(config, output_dir=str(folder)))
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    fix = f"remove {folder}, and it is trained again"
    times, metrics = (
        read_lines(folder / f"{name}.jsonl", schema, fix) for name, schema in (("times", TIMES), ("metrics", METRICS))
    )
    seconds = {k: round(sum(t.get(f"seconds_{k}", 0) for t in times), 3) for k in ("rollout", "update")}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "output_dir"}
    return str(final), {"settings": settings, "metrics": metrics, "seconds": seconds}


def training_budget(config: DiffusionGRPOConfig) -> dict[str, int]:
    """Updates, sampled completions, and the most forward passes of one row that sampling and updates together take: groups
    without variance are not computed, a threshold may need fewer steps, and validation is not counted."""
    from unmask.rl.dry_run import Work

    rollouts = math.ceil(config.max_steps / config.num_iterations)
    return {
        "updates": config.max_steps,
        "completions": rollouts * config.per_device_train_batch_size,
        "training_passes": Work.of(config).passes(config.max_steps, rollouts) * config.per_device_train_batch_size,
    }


def compact(model: str, records: list[Values], summary: Values) -> Values:
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
    """A job's process: what it prints goes to log.txt, what it finds through the pipe. It and all that it starts are a process
    group, which ends when the study does."""
    os.setpgrp()
    threading.Thread(target=_end_with_study, args=(pipe,), daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    import torch

    torch.set_num_threads(threads)

    def report(kind: str, line: Values) -> None:
        pipe.send((kind, line))

    try:
        run_job(job, folder, done, report)
    except UserError as error:
        report("error", {"says": str(error)})
        sys.exit(2)


def _end_with_study(pipe: Connection) -> None:
    """The study never sends: what ends the wait is its end."""
    with suppress(EOFError, OSError):
        pipe.recv()
    os.killpg(0, signal.SIGKILL)


# ---- the study -------------------------------------------------------------------------------------------------------------


class Lines:
    """A study's cells.jsonl or runs.jsonl: always whole, and in the order of the study, whatever is finished first."""

    def __init__(self, path: Path, keys: Sequence[str], read: Callable[[Path, str], list[Values]]) -> None:
        """Raises UserError where the file is damaged, or holds lines that the study does not name."""
        self.path, self.keys = path, keys
        self.lines = {line["key"]: line for line in read(path, "remove it, and what it held is run again")}
        if unknown_keys := len(set(self.lines) - set(keys)):
            raise UserError(
                f"{path} holds {unknown_keys} lines that this study does not name: give another output, or name them again"
            )

    def label(self, name: str, tables: dict[str, Values]) -> None:
        """Give every line the labels that it has in the study as it is now."""
        self.lines = {key: {**line, name: tables[key]} for key, line in self.lines.items()}
        self._write()

    def add(self, line: Values) -> None:
        self.lines[line["key"]] = line
        self._write()

    def _write(self) -> None:
        with atomic_write(self.path) as partial:
            partial.write_text(_text([self.lines[k] for k in self.keys if k in self.lines]), encoding="utf-8")


def _text(lines: list[Values]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)


def study(config: StudyConfig, config_dir: Path, progress: Progress | None = None) -> Values:
    """Run or go on with a study; returns its summary.

    Args:
        config_dir: the folder of the study's file. progress: called with (jobs done, jobs in all, names of those at work).

    Raises:
        UserError: for anything wrong in the request, where the folder holds cells of another study, and where a job fails;
            what is finished stays.
    """
    from unmask.results.summary import cell_lines, markdown, run_lines, summarize_study

    jobs = jobs_of(config, config_dir)
    tables, axes = labels(jobs)
    check_compared(config, axes)
    shown = pivots(config.tables, settings_of(jobs, tables), config.compare, config.baselines)
    output = Path(config.output)
    keys = [c.key for job in jobs for c in job.cells]
    with writing_to(output, "output"):
        output.mkdir(parents=True, exist_ok=True)
    with _exclusive_lock(output):
        cells = Lines(output / "cells.jsonl", keys, cell_lines)
        runs = Lines(output / "runs.jsonl", [job.name for job in jobs if job.training], run_lines)
        trained = training_labels(jobs, tables)
        waiting = [job for job in jobs if not _finished(job, cells, runs)]
        _check_problems(waiting)
        with writing_to(output, "output"):
            save_config(config, output / "study.yaml")
            cells.label("cell", tables)  # what is finished may have got another axis
            runs.label("train", trained)
            if waiting:  # what is there speaks of fewer cells
                for name in ("summary.json", "table.md"):
                    (output / name).unlink(missing_ok=True)
        _run(waiting, len(jobs), config.jobs, output, cells, runs, tables, trained, progress)
        _check_consistent(jobs, cells)
        summary = summarize_study([cells.lines[k] for k in keys], config.compare, config.baselines, shown)
        with writing_to(output, "output"):
            write_json(output / "summary.json", summary)
            write_text(output / "table.md", markdown(summary, shown))
    return summary


def _finished(job: Job, cells: Lines, runs: Lines) -> bool:
    return all(c.key in cells.lines for c in job.cells) and (job.training is None or job.name in runs.lines)


def _check_consistent(jobs: list[Job], cells: Lines) -> None:
    """Raises UserError where cells that should share their model or their problems do not."""
    seen: dict[tuple[str, ...], tuple[str, Any]] = {}
    for cell in (c for job in jobs for c in job.cells):
        line, e = cells.lines[cell.key], cell.evaluation
        problems = (e.task[0], e.split, str(e.limit), str(e.seed))
        for what, of, found in (
            ("weights", (cell.source,), line["model"]["weights"]),
            ("problems", problems, line["problems"]),
        ):
            before, same = seen.setdefault((what, *of), (cell.key, found))
            if same != found:
                raise UserError(
                    f"cells {before} and {cell.key} were made with different {what}: something changed while the study ran; "
                    "give another output"
                )


@contextmanager
def _exclusive_lock(output: Path) -> Iterator[None]:
    """Raises UserError where another process runs a study in this folder."""
    with writing_to(output, "output"):
        lock = FileLock(output / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"another process runs a study in {output}: wait for it, or use another output") from None
        except NotImplementedError:
            raise UserError(f"cannot lock {output}: use an output on another file system") from None
    with lock:
        yield


def _check_problems(jobs: list[Job]) -> None:
    """Raises UserError where a model or its problems cannot be had: now, and not when a job's turn comes."""
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


def _run(
    waiting: list[Job],
    total: int,
    at_once: int,
    output: Path,
    cells: Lines,
    runs: Lines,
    tables: dict[str, Values],
    trained: dict[str, Values],
    progress: Progress | None,
) -> None:
    """The jobs that lack a cell, ``at_once`` of them at a time."""
    finished = total - len(waiting)
    context: Any = multiprocessing.get_context(_START)
    context.set_forkserver_preload([__name__])  # imports once, not in every job
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
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
                with writing_to(output, "output"):
                    folder.mkdir(parents=True, exist_ok=True)
                gpu = gpus[slot % len(gpus)] if gpus else None
                process = context.Process(target=_process, args=(job, folder, done, threads, gpu, theirs))
                with _defer_sigint():
                    process.start()
                theirs.close()
                slots[slot] = (process, ours, job)
            if progress:
                progress(finished, total, [job.name for _, _, job in slots.values()])
            ready = wait([pipe for _, pipe, _ in slots.values()])
            for slot, (process, pipe, job) in list(slots.items()):
                if pipe not in ready:
                    continue
                if not (output / "study.yaml").is_file():
                    raise removed(output)
                try:
                    kind, line = pipe.recv()
                except (EOFError, OSError):
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
                    else:
                        runs.add({"key": job.name, "train": trained[job.name], **line})
        if progress:
            progress(finished, total, [])
    finally:
        for process, pipe, _ in slots.values():
            with suppress(ProcessLookupError):  # where it has no group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            pipe.close()


@contextmanager
def _defer_sigint() -> Iterator[None]:
    """Ctrl-C takes effect at the end: a process cut short while it starts leaves a traceback of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    usual = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came:
        raise KeyboardInterrupt


def _check_end(job: Job, code: int | None, output: Path, cells: Lines) -> None:
    missing = [c.key for c in job.cells if c.key not in cells.lines]
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
