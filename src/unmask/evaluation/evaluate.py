"""Evaluate a model: every task under every decoder, one JSON line a problem, resumable at any point.

A run folder holds ``config.json`` (the full resolved configuration), ``records/TASK--DECODER.jsonl``, ``summary.json`` and the
figures. Every process appends its records, batch by batch, to a shard of its own; rank 0 merges them at the end, or, if the run
is killed, at the start of the next. A resumed run gives the same records on any number of processes: every problem has its own
random seed, and greedy decoding does not depend on the batch.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from unmask import __version__
from unmask.decoding import Decoder, decode_each, make_decoder
from unmask.errors import UserError
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.curves import curves, kept_trajectories
from unmask.evaluation.distributed import Processes, init_distributed, take_own_gpu
from unmask.evaluation.progress import Progress
from unmask.evaluation.prompts import row_seeds, task_prompts
from unmask.evaluation.records import FIX, check_problem, compare_to_best, summarize
from unmask.io.files import folder_removed, slug, write_json, writing_to
from unmask.io.schema import COUNT, RECORD, Number
from unmask.io.store import Record, RecordStore, claim
from unmask.models.load import warn_of_slow_bf16
from unmask.models.masked_lm import MaskedLM
from unmask.tasks import Problem, Task, make_task

NOT_IN_CONFIG = ("output", "model", "task", "data", "decoder", "compile")
"""Fields of EvalConfig that config.json does not hold, or holds in another form."""


def environment() -> dict[str, Any]:
    """Versions, commit, hardware: what a number needs beside it."""
    packages = ("torch", "transformers", "reasoning-gym", "tokenizers", "numpy")
    root, commit = Path(__file__).parents[3], None
    if (root / ".git").exists() and shutil.which("git"):  # not where it is installed from a package
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(describe, capture_output=True, encoding="utf-8").stdout.strip() or None
    cpu = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpu.read_text(encoding="utf-8")) if cpu.is_file() else None
    return {
        "unmask": __version__,
        "commit": commit,
        "python": platform.python_version(),
        **{p: importlib.metadata.version(p) for p in packages},
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@dataclass(frozen=True)
class Cell:
    """One task under one decoder, its problems with their prompts, and the store of its records."""

    task_spec: str
    decoder_spec: str
    task: Task
    decoder: Decoder
    problems: list[Problem]
    prompts: list[str]
    store: RecordStore

    def todo(self, done: set[int]) -> list[int]:
        """The problems without a record, by length of prompt, so that batches waste little on padding."""
        return sorted(set(range(len(self.problems))) - done, key=lambda i: (len(self.prompts[i]), i))


@dataclass(frozen=True)
class PreparedEvaluation:
    """A checked evaluation; ``static_width`` is the padded prompt width of a compiled model, else 0."""

    lm: MaskedLM
    cells: list[Cell]
    settings: dict[str, Any]
    static_width: int


def prepare(config: EvalConfig) -> PreparedEvaluation:
    """Everything that can be wrong with a request is found here, before a folder is claimed. Raises UserError."""
    for spec in config.task_specs():
        make_task(spec, {})  # a typo is refused before weights are read
    lm = config.load()
    if lm.model.dtype == torch.bfloat16:
        warn_of_slow_bf16(lm.device)
    tasks = {spec: make_task(spec, lm.task_defaults) for spec in config.task_specs()}
    decoders = {spec: make_decoder(spec, max_new_tokens=config.max_new_tokens) for spec in config.decoder}
    cached = next((spec for spec, decoder in decoders.items() if decoder.cache != "none"), None)
    if config.compile and cached:
        raise UserError(f"compile needs forward passes of one shape, and {cached} has windows: leave one of them out")
    settings = {
        "model": lm.info(),
        **{k: v for k, v in asdict(config).items() if k not in NOT_IN_CONFIG},
        "tasks": {spec: task.config() for spec, task in tasks.items()},
        "decoders": {spec: d.config() for spec, d in decoders.items()},
    }
    canvas = max(d.max_new_tokens for d in decoders.values())
    cells, widest = [], 0
    for task_spec, task in tasks.items():
        problems = task.problems(config.split, config.limit, config.seed)
        prompts = task_prompts(lm, task, problems, config.shots, config.seed)
        widest = max(widest, lm.encode(prompts, canvas)[0].shape[1])
        for spec, decoder in decoders.items():
            path = Path(config.output) / "records" / f"{slug(task_spec)}--{slug(spec)}.jsonl"
            schema = dict(RECORD)
            if config.trajectories:
                step, length = Number(-1, decoder.plan.steps - 1, whole=True), decoder.max_new_tokens
                schema |= {"tokens": [COUNT, length], "steps": [step, length], "logprobs": [Number(), length]}
            check = partial(check_problem, problems=problems)
            store = RecordStore(path, schema, itemgetter("index"), FIX, check)
            cells.append(Cell(task_spec, spec, task, decoder, problems, prompts, store))
    if config.compile:
        lm.model.base_model.compile()
    return PreparedEvaluation(lm, cells, settings, widest if config.compile else 0)


def run_cell(
    prepared: PreparedEvaluation, cell: Cell, indexes: list[int], config: EvalConfig
) -> Iterator[list[Record]]:
    """Decode and grade the problems at ``indexes``; yields the records of those that finish together."""
    if not indexes:
        return
    lm, seeds = prepared.lm, row_seeds(config.seed, indexes)
    prompts = [cell.prompts[i] for i in indexes]
    start = time.perf_counter()
    found = decode_each(lm, prompts, cell.decoder, seeds, config.batch_size, config.early_stop, prepared.static_width)
    for numbers, trajectory in found:
        texts = lm.text(trajectory.tokens)
        lengths, nfe = lm.lengths(trajectory.tokens).tolist(), trajectory.nfe.tolist()
        seconds = (time.perf_counter() - start) / len(numbers)
        committed = (trajectory.step >= 0).sum(1).tolist()
        kept = kept_trajectories(trajectory) if config.trajectories else [{}] * len(numbers)
        problems = [cell.problems[indexes[number]] for number in numbers]
        yield [
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
            for row, (number, problem) in enumerate(zip(numbers, problems, strict=True))
        ]
        start = time.perf_counter()  # grading and writing are not decoding


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
    processes, output = init_distributed(), Path(config.output)
    if processes.world > 1 and config.device != "cpu":
        take_own_gpu()
    with processes.sync_errors():
        prepared = prepare(config)

    def claimed() -> tuple[dict[str, Any], list[set[int]]]:
        with writing_to(output):
            claim(output, prepared.settings, ["batch_size"], ["tasks", "decoders", "limit"])
            (output / "records").mkdir(exist_ok=True)
            return prepared.settings, [set(cell.store.merge(processes.world)) for cell in prepared.cells]

    settings, done = processes.on_rank0(claimed)
    with processes.sync_errors():
        if settings != prepared.settings:
            raise UserError("the processes find different models or data: put the same files on every machine")
        if not (output / "config.json").is_file():
            raise UserError(f"not every machine sees {output}: choose an --output that they all share")
    _decode(prepared, config, processes, done, progress if processes.rank == 0 and progress else lambda *_: None)
    return processes.on_rank0(lambda: _summary(prepared, config, processes.world))


def _decode(
    prepared: PreparedEvaluation, config: EvalConfig, processes: Processes, done: list[set[int]], progress: Progress
) -> None:
    """This process's share of every cell into its shards; returns when all processes have done theirs."""
    whose = f" · process 1 of {processes.world}" if processes.world > 1 else ""
    for cell, finished in zip(prepared.cells, done, strict=True):
        share = cell.todo(finished)[processes.rank :: processes.world]
        label, count = f"{cell.task_spec} · {cell.decoder_spec}{whose}", len(finished)
        total = count + len(share)
        progress(label, count, total)
        for records in run_cell(prepared, cell, share, config):
            if not (Path(config.output) / "config.json").is_file():
                raise folder_removed(Path(config.output))
            with writing_to(config.output):
                cell.store.append(records, processes.rank)
            count += len(records)
            progress(label, count, total)
    if whose:
        progress("the other processes", 0, 1)
    processes.gather(None)
    if whose:
        progress("the other processes", 1, 1)


def _summary(prepared: PreparedEvaluation, config: EvalConfig, world: int) -> dict[str, Any]:
    """Merge the shards and write the summary."""
    cells, kept = [], []
    for cell in prepared.cells:
        with writing_to(config.output):
            records = list(cell.store.merge(world).values())
        if missing := len(cell.problems) - len(records):
            raise UserError(
                f"{cell.store.path} lacks {missing} of {len(cell.problems)} records: choose an --output that all processes "
                "share and no other run writes to, and start again"
            )
        names = {"task": cell.task_spec, "decoder": cell.decoder_spec, "score_name": cell.task.score_name}
        cells.append({**names, **summarize(records)})
        if config.trajectories:
            steps = cell.decoder.plan.steps if cell.decoder.threshold is None else None
            cells[-1]["curves"] = curves(records, prepared.lm.end_ids, steps)
        kept.append(records)
    compare_to_best(cells, kept)
    summary = {"config": prepared.settings, "environment": environment() | {"processes": world}, "cells": cells}
    with writing_to(config.output):
        write_json(Path(config.output) / "summary.json", summary)
    return summary
