"""Evaluate a model: every task under every decoder, one JSON line a problem, resumable at any point.

A run folder holds ``config.json`` (the full resolved configuration with versions and commit), ``records/TASK--DECODER.jsonl``,
``summary.json`` and the figures. Records are appended batch by batch; a killed run goes on where it stopped and gives the same
records, because every problem has its own random seed and greedy decoding does not depend on the batch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from unmask import __version__
from unmask.decoding import Decoder, decode_each, make_decoder
from unmask.evaluation.statistics import pooled_bootstrap, wilson
from unmask.files import drop_cut_line, read_lines, write_json, writing_to
from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.spec import UserError, check_at_least
from unmask.tasks import Problem, Task, make_task

Record = dict[str, Any]


@dataclass
class EvalConfig:
    """What to evaluate."""

    model: str = "tiny"
    """A shipped model's name or the path of a checkpoint folder."""
    task: list[str] = field(default_factory=lambda: ["sudoku", "countdown"])
    """Task specs, e.g. ``sudoku countdown:numbers=4``."""
    decoder: list[str] = field(default_factory=lambda: ["full", "semi-ar", "eoser", "ass", "eoser-ass", "hybrid"])
    """Decoder specs, e.g. ``full eoser-ass:blocks=4``, or YAML files."""
    limit: int | None = 256
    """Problems a task (``None``: a whole data file)."""
    split: str = "test"
    """``train``, ``validation``, ``test``; Sudoku also ``heldout`` (grids no training puzzle came from)."""
    shots: int = 0
    """Worked examples in front of every problem, from the training split; for tasks that have worked responses."""
    max_new_tokens: int = 128
    """Canvas length in tokens, unless a decoder sets its own."""
    early_stop: bool = True
    """A row is finished once its text is: all committed up to its first end token. Changes passes, not text."""
    batch_size: int = 32
    """Rows of one forward pass; a finished row makes room for the next problem."""
    seed: int = 0
    """Seed of the problems and of any sampling."""
    dtype: str = "float32"
    """``float32`` or ``bfloat16``."""
    device: str = "cpu"
    compile: bool = False
    """torch.compile the model; all forward passes then have one shape."""
    output: str = "runs/eval"
    """Run folder. A second call with the same settings goes on or just prints the result."""
    diagnostics: bool = False
    """Also measure EOS confidence and the EOS share of commits over the steps, and draw them."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "shots")
        if not 0 <= self.seed < 2**30:
            raise UserError(f"seed is {self.seed}: give 0 to {2**30 - 1}")
        if not self.task or not self.decoder:
            raise UserError("give at least one task and one decoder")


def environment() -> dict[str, Any]:
    """Versions, commit, hardware: what a number needs beside it."""
    packages = ("torch", "transformers", "reasoning-gym", "tokenizers", "numpy")
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
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
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    """A file name for a spec; a hash keeps apart what the replacement of characters would confuse."""
    plain = re.sub(r"[^A-Za-z0-9.+=-]+", "_", text).strip("_")
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_records(path: Path) -> list[Record]:
    """A records file by index."""
    return sorted(read_lines(path), key=lambda r: int(r["index"]))


def task_prompts(lm: MaskedLM, task: Task, problems: Sequence[Problem], shots: int = 0, seed: int = 0) -> list[str]:
    """The prompt of every problem, behind ``shots`` worked examples of the training split where asked for."""
    examples: list[tuple[str, str]] = []
    for example in task.problems("train", shots, seed) if shots else ():
        if example.response is None:
            raise UserError(
                f"task {task.name} has no worked responses here: leave --shots out, or use its compact style"
            )
        examples.append((task.instruction(example), example.response))
    return [lm.chat(task.instruction(p), task.prefill, examples) for p in problems]


def run_cell(
    lm: MaskedLM,
    task: Task,
    decoder: Decoder,
    problems: list[tuple[int, Problem]],
    prompts: list[str],
    config: EvalConfig,
    static_width: int,
) -> Iterator[list[Record]]:
    """Decode and grade (index, problem)s with their prompts; yields the records of those that finish together."""
    seeds = torch.tensor([config.seed * 2**32 + index for index, _ in problems], dtype=torch.int64)
    start = time.perf_counter()
    found = decode_each(lm, prompts, decoder, seeds, config.batch_size, config.early_stop, static_width)
    for numbers, trajectory in found:
        texts = lm.text(trajectory.tokens)
        lengths, nfe = lm.lengths(trajectory.tokens).tolist(), trajectory.nfe.tolist()
        seconds = (time.perf_counter() - start) / len(numbers)
        committed = (trajectory.step >= 0).sum(1).tolist()
        records = []
        for row, number in enumerate(numbers):
            index, problem = problems[number]
            records.append(
                {
                    "index": index,
                    "id": problem.id,
                    "prompt": prompts[number],
                    "completion": texts[row],
                    **asdict(task.grade(problem, texts[row])),
                    "nfe": nfe[row],
                    "committed": committed[row],
                    "length": lengths[row],
                    "seconds": round(seconds, 6),
                }
            )
        yield records
        start = time.perf_counter()  # grading and writing are not decoding


def summarise(records: list[Record]) -> dict[str, Any]:
    """One cell of the table: shares with 95 % intervals, passes, lengths, time."""
    n = len(records)
    solved = sum(r["solved"] for r in records)
    points, possible = [r["points"] for r in records], [r["possible"] for r in records]
    nfe = sum(r["nfe"] for r in records) / n
    return {
        "problems": n,
        "solved": solved / n,
        "solved_interval": list(wilson(solved, n)),
        "score": sum(points) / sum(possible),
        "score_interval": list(pooled_bootstrap(points, possible)),
        "nfe": nfe,
        "tokens_per_forward": sum(r["committed"] for r in records) / n / nfe,
        "length": sum(r["length"] for r in records) / n,
        "seconds": sum(r["seconds"] for r in records),
    }


def evaluate(config: EvalConfig, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Run or resume an evaluation and write its folder.

    Args:
        progress: called with (cell label, problems done, problems in all) after every batch.

    Returns:
        The summary: ``config``, ``environment`` and one entry a (task, decoder) in ``cells``.

    Raises:
        UserError: for anything wrong in the request, and where ``output`` holds an evaluation with other settings.
    """
    lm = load(config.model, config.dtype, config.device)
    tasks = {spec: make_task(spec, lm.task_defaults) for spec in config.task}
    decoders = {spec: make_decoder(spec, max_new_tokens=config.max_new_tokens) for spec in config.decoder}
    cached = [spec for spec, decoder in decoders.items() if decoder.cache != "none"]
    if config.compile and cached:
        raise UserError(
            f"compile needs forward passes of one shape, and {cached[0]} has windows: leave one of them out"
        )
    output = Path(config.output)
    resolved = {
        "model": lm.info(),
        **{
            k: v
            for k, v in asdict(config).items()
            if k not in ("output", "model", "task", "decoder", "diagnostics", "compile")
        },
        "tasks": {spec: task.config() for spec, task in tasks.items()},
        "decoders": {spec: d.config() for spec, d in decoders.items()},
    }
    # All that can be wrong with the request is found before the folder is claimed.
    sets = {
        spec: list(enumerate(task.problems(config.split, config.limit, config.seed))) for spec, task in tasks.items()
    }
    canvas = max(d.max_new_tokens for d in decoders.values())
    prompts = {
        spec: task_prompts(lm, task, [p for _, p in sets[spec]], config.shots, config.seed)
        for spec, task in tasks.items()
    }
    widest = max(lm.encode(texts, canvas)[0].shape[1] for texts in prompts.values())
    if config.compile:
        lm.model.base_model.compile()
    static_width = widest if config.compile else 0
    try:
        with writing_to(output):
            (output / "records").mkdir(parents=True, exist_ok=True)
            _claim(output / "config.json", resolved)
    except json.JSONDecodeError:
        raise UserError(f"{output / 'config.json'} is damaged: remove it or give another --output") from None
    cells = []
    for task_spec, task in tasks.items():
        problems = sets[task_spec]
        texts = prompts[task_spec]
        by_length = sorted(problems, key=lambda ip: len(texts[ip[0]]))  # batches waste little on padding
        for decoder_spec, decoder in decoders.items():
            label = f"{task_spec} · {decoder_spec}"
            path = output / "records" / f"{slug(task_spec)}--{slug(decoder_spec)}.jsonl"
            drop_cut_line(path)
            found = read_records(path)
            if any(r["index"] >= len(problems) or r["id"] != problems[r["index"]][1].id for r in found):
                raise UserError(f"{path} holds records of other problems: give another --output")
            done = {r["index"] for r in found}
            todo = [ip for ip in by_length if ip[0] not in done]
            if progress:
                progress(label, len(done), len(problems))
            with path.open("a") as file:
                count = len(done)
                for records in run_cell(lm, task, decoder, todo, [texts[i] for i, _ in todo], config, static_width):
                    file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
                    file.flush()
                    count += len(records)
                    if progress:
                        progress(label, count, len(problems))
            cell = {"task": task_spec, "decoder": decoder_spec, "score_name": task.score_name}
            cells.append({**cell, **summarise(read_records(path))})
    summary = {"config": resolved, "environment": environment(), "cells": cells}
    if config.diagnostics:
        from unmask.evaluation.diagnostics import eos_curves  # only here: it decodes again

        summary["diagnostics"] = [
            {"task": t, "decoder": d, **eos_curves(lm, task, decoder, config)}
            for t, task in tasks.items()
            for d, decoder in decoders.items()
        ]
    write_json(output / "summary.json", summary)
    return summary


def _claim(path: Path, resolved: dict[str, Any]) -> None:
    """Make the folder this evaluation's, or refuse if it already belongs to one with other settings."""
    now = json.loads(json.dumps(resolved))
    if not path.exists():
        write_json(path, now)
        return
    before = json.loads(path.read_text())
    changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    # More tasks or decoders may join a folder; what is there already must be unchanged.
    for key in ("tasks", "decoders"):
        shared = set(before.get(key, {})) & set(now[key])
        if key in changed and all(before[key][s] == now[key][s] for s in shared):
            changed.remove(key)
            now[key] = {**before[key], **now[key]}
    if changed:
        raise UserError(f"{path.parent} holds an evaluation with other {', '.join(changed)}: give another --output")
    write_json(path, now)
