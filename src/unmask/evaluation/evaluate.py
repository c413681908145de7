"""Evaluate a model: every task under every decoder, one JSON line a problem, resumable at any point.

Every process appends its records, batch by batch, to its shard; rank 0 merges them at the end, or, if the run is killed,
at the start of the next. Every problem has its own random seed, so any number of processes gives the same records.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from unmask import __version__
from unmask.decoding import Decoder, decode_each, make_decoder
from unmask.errors import UserError
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.distributed import Processes, init_distributed, take_own_gpu
from unmask.evaluation.progress import Progress
from unmask.evaluation.records import FIX, check_problem, compare_to_best, curves, kept_trajectories, summarize
from unmask.io.files import folder_removed, slug, write_json, writing_to
from unmask.io.schema import COUNT, RECORD, Number
from unmask.io.store import Record, RecordStore, claim
from unmask.models.load import warn_of_slow_bf16
from unmask.models.masked_lm import MaskedLM
from unmask.tasks import Problem, Task, make_task
from unmask.tasks.base import grade_completion


def environment() -> dict[str, Any]:
    """Versions, commit, hardware: what a number needs beside it."""
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
        **{p: version(p) for p in ("torch", "transformers", "reasoning-gym", "tokenizers", "numpy")},
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

    config: EvalConfig
    lm: MaskedLM
    cells: list[Cell]
    settings: dict[str, Any]
    static_width: int


def problem_seeds(seed: int, indexes: Sequence[int]) -> torch.Tensor:
    """The seed of each problem, (len(indexes),) int64: it depends on nothing but the evaluation's seed and its index."""
    return torch.tensor([seed * 2**32 + i for i in indexes], dtype=torch.int64)


def task_prompts(lm: MaskedLM, task: Task, problems: Sequence[Problem], shots: int = 0, seed: int = 0) -> list[str]:
    """The prompt of every problem, behind ``shots`` worked examples of the training split where asked for."""
    examples = task.problems("train", shots, seed) if shots else []
    return [task.prompt(lm, problem, examples) for problem in problems]


def prepare(config: EvalConfig) -> PreparedEvaluation:
    """Everything that can be wrong with a request is found here, before a folder is claimed. Raises UserError."""
    for spec in config.task:
        make_task(spec, {})  # a typo is refused before weights are read
    lm = config.load()
    if lm.model.dtype == torch.bfloat16:
        warn_of_slow_bf16(lm.device)
    tasks = {spec: make_task(spec, lm.task_defaults) for spec in config.task}
    defaults: dict[str, Any] = {"max_new_tokens": config.max_new_tokens}
    if config.compile:
        defaults["cache"] = "none"
    decoders = {spec: make_decoder(spec, **defaults).within(lm.block_length) for spec in config.decoder}
    if config.compile and (cached := [spec for spec, decoder in decoders.items() if decoder.cache != "none"]):
        raise UserError(
            f"compile needs forward passes of one shape, and {cached[0]} has windows: leave one of them out"
        )
    in_another_form = ("output", "model", "task", "decoder", "compile")
    settings = {
        "model": lm.info(),
        **{k: v for k, v in asdict(config).items() if k not in in_another_form},
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
            store = RecordStore(path, schema, itemgetter("index"), FIX, partial(check_problem, problems=problems))
            cells.append(Cell(task_spec, spec, task, decoder, problems, prompts, store))
    if config.compile:
        lm.model.base_model.compile()
    return PreparedEvaluation(config, lm, cells, settings, widest if config.compile else 0)


def run_cell(prepared: PreparedEvaluation, cell: Cell, indexes: list[int]) -> Iterator[list[Record]]:
    """Decode and grade the problems at ``indexes``; yields the records of those that finish together."""
    if not indexes:
        return
    lm, config = prepared.lm, prepared.config
    prompts, seeds = [cell.prompts[i] for i in indexes], problem_seeds(config.seed, indexes)
    start = time.perf_counter()
    found = decode_each(lm, prompts, cell.decoder, seeds, config.batch_size, config.early_stop, prepared.static_width)
    for numbers, trajectory in found:
        counts = trajectory.nfe, (trajectory.step >= 0).sum(1), lm.lengths(trajectory.tokens)
        kept = kept_trajectories(trajectory) if config.trajectories else [{}] * len(numbers)
        own, texts = [indexes[number] for number in numbers], lm.text(trajectory.tokens)
        finished = zip(own, texts, *(c.tolist() for c in counts), kept, strict=True)
        seconds = round((time.perf_counter() - start) / len(numbers), 6)
        yield [
            {
                "index": i,
                "id": cell.problems[i].id,
                "task": cell.task_spec,
                "decoder": cell.decoder_spec,
                "truth": cell.problems[i].truth,
                "prompt": cell.prompts[i],
                "completion": text,
                **asdict(grade_completion(cell.task, cell.problems[i], text)),
                "nfe": nfe,
                "committed": committed,
                "length": length,
                "seconds": seconds,
                **trajectories,
            }
            for i, text, nfe, committed, length, trajectories in finished
        ]
        start = time.perf_counter()  # grading and writing are not decoding


def evaluate(config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run or resume an evaluation and write its folder; every process of a launch calls it.

    Args:
        progress: called on rank 0 with (cell label, problems done, problems in all) of its share after every batch.

    Returns:
        The summary, on every process: ``config``, ``environment`` and one entry a (task, decoder) in ``cells``.

    Raises:
        UserError: for anything wrong in the request, and where ``output`` holds an evaluation with other settings.
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
    _decode(prepared, processes, done, progress if processes.rank == 0 and progress else lambda *_: None)
    return processes.on_rank0(lambda: _summary(prepared, processes.world))


def _decode(prepared: PreparedEvaluation, processes: Processes, done: list[set[int]], progress: Progress) -> None:
    """This process's share of every cell into its shards; returns when all processes have done theirs."""
    output = Path(prepared.config.output)
    whose = f" · process 1 of {processes.world}" if processes.world > 1 else ""
    for cell, finished in zip(prepared.cells, done, strict=True):
        share = cell.todo(finished)[processes.rank :: processes.world]
        label, count = f"{cell.task_spec} · {cell.decoder_spec}{whose}", len(finished)
        total = count + len(share)
        progress(label, count, total)
        for records in run_cell(prepared, cell, share):
            if not (output / "config.json").is_file():
                raise folder_removed(output)
            with writing_to(output):
                cell.store.append(records, processes.rank)
            count += len(records)
            progress(label, count, total)
    if processes.world > 1:
        progress("the other processes", 0, 1)
        processes.gather(None)
        progress("the other processes", 1, 1)


def _summary(prepared: PreparedEvaluation, world: int) -> dict[str, Any]:
    """Merge the shards and write the summary."""
    output, cells, kept = Path(prepared.config.output), [], []
    for cell in prepared.cells:
        with writing_to(output):
            records = list(cell.store.merge(world).values())
        if missing := len(cell.problems) - len(records):
            hint = "choose an --output that all processes share and no other run writes to, and start again"
            raise UserError(f"{cell.store.path} lacks {missing} of {len(cell.problems)} records: {hint}")
        names = {"task": cell.task_spec, "decoder": cell.decoder_spec, "score_name": cell.task.score_name}
        cells.append({**names, **summarize(records)})
        if prepared.config.trajectories:
            steps = None if cell.decoder.adaptive else cell.decoder.plan.steps
            cells[-1]["curves"] = curves(records, prepared.lm.end_ids, steps)
        kept.append(records)
    compare_to_best(cells, kept)
    summary = {"config": prepared.settings, "environment": environment() | {"processes": world}, "cells": cells}
    with writing_to(output):
        write_json(output / "summary.json", summary)
    return summary
