"""Evaluate a model: every task under every decoder, one JSON line a problem, resumable at any point.

A run folder holds ``config.json`` (the full resolved configuration), ``records/TASK--DECODER.jsonl``, ``summary.json`` and the
figures. Every process appends its records, batch by batch, to a shard of its own; rank 0 merges them at the end, or, if the run
is killed, at the start of the next. A resumed run gives the same records on any number of processes: every problem has its own
random seed, and greedy decoding does not depend on the batch.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from unmask import __version__
from unmask.decoding import Decoder, decode_each, make_decoder
from unmask.errors import UserError
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.curves import curves, kept_trajectories
from unmask.evaluation.diagnostics import eos_curves
from unmask.evaluation.distributed import Processes, join, take_own_gpu
from unmask.evaluation.prompts import row_seeds, task_prompts
from unmask.evaluation.records import Record, as_lines, compare_to_best, merge, shard, summarize
from unmask.io.files import read_json, removed, slug, write_json, writing_to
from unmask.io.schema import CONFIG, COUNT, RECORD, Number
from unmask.models.load import warn_of_slow_bf16
from unmask.models.masked_lm import MaskedLM
from unmask.tasks import Problem, Task, make_task

_NOT_IN_CONFIG = ("output", "model", "task", "data", "decoder", "diagnostics", "compile")
"""Fields of EvalConfig that config.json does not hold, or holds in another form."""


def environment() -> dict[str, Any]:
    """Versions, commit, hardware: what a number needs beside it."""
    packages = ("torch", "transformers", "reasoning-gym", "tokenizers", "numpy")
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(describe, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # installed from a package, not a checkout
    return {
        "unmask": __version__,
        "commit": commit,
        "python": platform.python_version(),
        **{p: importlib.metadata.version(p) for p in packages},
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Cell:
    """One task under one decoder, its problems with their prompts, and the file of its records."""

    task_spec: str
    decoder_spec: str
    task: Task
    decoder: Decoder
    problems: list[Problem]
    prompts: list[str]
    path: Path

    def record(self, config: EvalConfig) -> dict[str, Any]:
        """What a record must hold."""
        if not config.trajectories:
            return RECORD
        length, last = self.decoder.max_new_tokens, self.decoder.plan.steps - 1
        kinds = {"tokens": COUNT, "steps": Number(-1, last, whole=True), "logprobs": Number()}
        return {**RECORD, **{name: [kind, length] for name, kind in kinds.items()}}

    def todo(self, done: set[int]) -> list[int]:
        """The problems without a record, by length of prompt, so that batches waste little on padding."""
        return sorted(set(range(len(self.problems))) - done, key=lambda i: (len(self.prompts[i]), i))


@dataclass(frozen=True)
class PreparedEvaluation:
    """A checked evaluation; ``static_width`` is the padded prompt width of a compiled model, else 0."""

    lm: MaskedLM
    cells: list[Cell]
    resolved: dict[str, Any]
    static_width: int


def prepare(config: EvalConfig) -> PreparedEvaluation:
    """Everything that can be wrong with a request is found here, before a folder is claimed. Raises UserError."""
    lm = config.load()
    if lm.model.dtype == torch.bfloat16:
        warn_of_slow_bf16(lm.device)
    tasks = {spec: make_task(spec, lm.task_defaults) for spec in config.task_specs()}
    decoders = {spec: make_decoder(spec, max_new_tokens=config.max_new_tokens) for spec in config.decoder}
    cached = [spec for spec, decoder in decoders.items() if decoder.cache != "none"]
    if config.compile and cached:
        raise UserError(
            f"compile needs forward passes of one shape, and {cached[0]} has windows: leave one of them out"
        )
    resolved = {
        "model": lm.info(),
        **{k: v for k, v in asdict(config).items() if k not in _NOT_IN_CONFIG},
        "tasks": {spec: task.config() for spec, task in tasks.items()},
        "decoders": {spec: d.config() for spec, d in decoders.items()},
    }
    canvas = max(d.max_new_tokens for d in decoders.values())
    cells, widest = [], 0
    for task_spec, task in tasks.items():
        problems = task.problems(config.split, config.limit, config.seed)
        prompts = task_prompts(lm, task, problems, config.shots, config.seed)
        widest = max(widest, lm.encode(prompts, canvas)[0].shape[1])
        for decoder_spec, decoder in decoders.items():
            path = Path(config.output) / "records" / f"{slug(task_spec)}--{slug(decoder_spec)}.jsonl"
            cells.append(Cell(task_spec, decoder_spec, task, decoder, problems, prompts, path))
    if config.compile:
        lm.model.base_model.compile()
    return PreparedEvaluation(lm, cells, resolved, widest if config.compile else 0)


def run_cell(request: PreparedEvaluation, cell: Cell, indexes: list[int], config: EvalConfig) -> Iterator[list[Record]]:
    """Decode and grade the problems at ``indexes``; yields the records of those that finish together."""
    lm = request.lm
    prompts = [cell.prompts[i] for i in indexes]
    seeds = row_seeds(config.seed, indexes)
    start = time.perf_counter()
    found = decode_each(lm, prompts, cell.decoder, seeds, config.batch_size, config.early_stop, request.static_width)
    for numbers, trajectory in found:
        texts = lm.text(trajectory.tokens)
        lengths, nfe = lm.lengths(trajectory.tokens).tolist(), trajectory.nfe.tolist()
        seconds = (time.perf_counter() - start) / len(numbers)
        committed = (trajectory.step >= 0).sum(1).tolist()
        kept = kept_trajectories(trajectory) if config.trajectories else [{}] * len(numbers)
        records = []
        for row, number in enumerate(numbers):
            problem = cell.problems[indexes[number]]
            records.append(
                {
                    "index": indexes[number],
                    "id": problem.id,
                    "task": cell.task_spec,
                    "decoder": cell.decoder_spec,
                    "truth": problem.truth,
                    "prompt": prompts[number],
                    "completion": texts[row],
                    **asdict(cell.task.grade(problem, texts[row])),
                    "nfe": nfe[row],
                    "committed": committed[row],
                    "length": lengths[row],
                    "seconds": round(seconds, 6),
                    **kept[row],
                }
            )
        yield records
        start = time.perf_counter()  # grading and writing are not decoding


Progress = Callable[[str, int, int], None]


def evaluate(config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run or resume an evaluation and write its folder; every process of a launch calls it.

    Args:
        progress: called on rank 0 with (cell label, problems done, problems in all) after every batch; of several processes
            it is told of rank 0's share.

    Returns:
        The summary, on every process: ``config``, ``environment`` and one entry a (task, decoder) in ``cells``.

    Raises:
        UserError: for anything wrong in the request, and where ``output`` holds an evaluation with other settings; an
            AgreedError, on every process, where there are several.
    """
    processes = join()
    if processes.world > 1 and config.device != "cpu":
        take_own_gpu()
    with processes.sync_errors():
        request = prepare(config)
    resolved, done = processes.first(lambda: _open(request, config, processes.world))
    with processes.sync_errors():
        if resolved != request.resolved:
            raise UserError("the processes find different models or data: give every machine the same files")
        if not (Path(config.output) / "config.json").is_file():
            raise UserError(f"not every machine sees {config.output}: give an --output that they all share")
    _decode(request, config, processes, done, progress if processes.rank == 0 else None)
    return processes.first(lambda: _finish(request, config, processes.world))


def _open(request: PreparedEvaluation, config: EvalConfig, world: int) -> tuple[dict[str, Any], list[set[int]]]:
    """Claim the folder and merge what a killed run left; the settings and the problems done, cell by cell."""
    output = Path(config.output)
    with writing_to(output):
        (output / "records").mkdir(parents=True, exist_ok=True)
        _claim(output / "config.json", request.resolved)
        return request.resolved, [set(merge(c.path, c.problems, world, c.record(config))) for c in request.cells]


def _decode(
    request: PreparedEvaluation,
    config: EvalConfig,
    processes: Processes,
    done: list[set[int]],
    progress: Progress | None,
) -> None:
    """This process's share of every cell into its shards; returns when all processes have done theirs."""
    whose = f" · process 1 of {processes.world}" if processes.world > 1 else ""
    for cell, finished in zip(request.cells, done, strict=True):
        share = cell.todo(finished)[processes.rank :: processes.world]
        label, count = f"{cell.task_spec} · {cell.decoder_spec}{whose}", len(finished)
        total = count + len(share)
        if progress:
            progress(label, count, total)
        if not share:
            continue
        with writing_to(config.output), shard(cell.path, processes.rank).open("a", encoding="utf-8") as file:
            for records in run_cell(request, cell, share, config):
                if not (Path(config.output) / "config.json").is_file():
                    raise removed(Path(config.output))
                file.write(as_lines(records))
                file.flush()
                count += len(records)
                if progress:
                    progress(label, count, total)
    if progress and whose:
        progress("the other processes", 0, 1)
    processes.gather(None)
    if progress and whose:
        progress("the other processes", 1, 1)


def _finish(request: PreparedEvaluation, config: EvalConfig, world: int) -> dict[str, Any]:
    """Merge the shards and write the summary."""
    cells, kept = [], []
    for cell in request.cells:
        with writing_to(config.output):
            records = list(merge(cell.path, cell.problems, world, cell.record(config)).values())
        if missing := len(cell.problems) - len(records):
            raise UserError(
                f"{cell.path} lacks {missing} of {len(cell.problems)} records: give an --output that all processes share "
                "and no other run writes to, and start again"
            )
        names = {"task": cell.task_spec, "decoder": cell.decoder_spec, "score_name": cell.task.score_name}
        found = summarize(records)
        if config.trajectories:
            steps = cell.decoder.plan.steps if cell.decoder.threshold is None else None
            found["curves"] = curves(records, request.lm.end_ids, steps)
        cells.append({**names, **found})
        kept.append(records)
    compare_to_best(cells, kept)
    facts = {**environment(), "processes": world}
    summary = {"config": request.resolved, "environment": facts, "cells": cells}
    if config.diagnostics:
        summary["diagnostics"] = [
            {"task": c.task_spec, "decoder": c.decoder_spec, **eos_curves(request.lm, c.task, c.decoder, config)}
            for c in request.cells
        ]
    with writing_to(config.output):
        write_json(Path(config.output) / "summary.json", summary)
    return summary


def _with_defaults(resolved: dict[str, Any]) -> dict[str, Any]:
    """Settings that were written before a field was added, with what then held: its default."""
    known = {f.name: f.default for f in fields(EvalConfig) if f.default is not MISSING and f.name not in _NOT_IN_CONFIG}
    decoders = {spec: {**Decoder().config(), **d} for spec, d in resolved["decoders"].items()}
    return {**known, **resolved, "decoders": decoders}


def _claim(path: Path, resolved: dict[str, Any]) -> None:
    """Make the folder this evaluation's, or refuse if it already belongs to one with other settings."""
    now = json.loads(json.dumps(resolved))
    if not path.exists():
        write_json(path, now)
        return
    before = _with_defaults(read_json(path, CONFIG, "remove it or give another --output"))
    changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k) and k != "batch_size")
    # More tasks or decoders may join a folder; what is there already must be unchanged.
    for key in ("tasks", "decoders"):
        shared = set(before[key]) & set(now[key])
        if key in changed and all(before[key][s] == now[key][s] for s in shared):
            changed.remove(key)
            now[key] = {**before[key], **now[key]}
    if "limit" in changed and before["limit"] is not None and (now["limit"] is None or now["limit"] > before["limit"]):
        changed.remove("limit")  # the first problems stay the same, and more join them
    if changed:
        raise UserError(f"{path.parent} holds an evaluation with other {', '.join(changed)}: give another --output")
    write_json(path, now)
