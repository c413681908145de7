"""Folders of ``unmask eval``, ``unmask rl``, ``unmask distill`` and studies as sources of a report. Nothing is drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from benchmarks.report.source import Source, by_update, label_runs
from benchmarks.report.study import read_study
from benchmarks.study.lines import FIX
from unmask.errors import UserError
from unmask.io.files import each_line, read_json, read_lines, read_yaml, slug
from unmask.io.schema import COUNT, METRICS, POSITIVE, RECORD, SUMMARY, TIMES, check_summary
from unmask.results.figures import evaluation_cells
from unmask.results.tables import evaluation_table

_FOLDERS = "choose a folder of unmask rl, unmask distill, unmask eval or a study"
_NOT_SETTINGS = ("seed", "output_dir", "eval_steps", "save_steps", "report_to", "log_completions", "rows_per_forward")


def collect(folders: Sequence[Path]) -> list[Source]:
    """Read folders, which may be of different kinds.

    Raises:
        UserError: for a folder that is of none of the three kinds, named twice, empty, unfinished or damaged.
    """
    sources = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    cells = [(source.name, source.cells) for source in sources if source.cells]
    of_studies = [(source.name, source.runs) for source in sources if source.runs and "label" in source.runs[0]]
    plain = [run for source in sources for run in source.runs if "label" not in run]
    label_runs(plain)
    for named, several in ((cells, len(cells) > 1), (of_studies, len(of_studies) + bool(plain) > 1)):
        for name, rows in named if several else ():
            for row in rows:
                row["label"] += f" · {name}"
    return sources


def _read(folder: Path, name: str) -> Source:
    if not folder.is_dir():
        raise UserError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}: {_FOLDERS}")
    there = {path.name for path in folder.iterdir()}
    for files, read in (
        ({"cells.jsonl"}, read_study),
        ({"config.yaml", "metrics.jsonl"}, _read_run),
        ({"config.json", "summary.json"}, _read_evaluation),
    ):
        if files <= there:
            return read(folder, name)
    if {"config.json", "records"} <= there:
        raise UserError(f"{folder} holds an evaluation that is not finished: start its unmask eval command again")
    raise UserError(
        f"{folder} holds no reinforcement-learning run (config.yaml, metrics.jsonl), no evaluation (config.json, "
        f"summary.json) and no study (cells.jsonl): {_FOLDERS}"
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    if twice := next((f for i, f in enumerate(folders) if parts[i] in parts[:i]), None):
        raise UserError(f"{twice} is named twice: name it once")
    tails = (["/".join(p[-depth:]) for p in parts] for depth in range(1, max(map(len, parts)) + 1))
    return next(names for names in tails if len(set(names)) == len(names))


def _read_evaluation(folder: Path, name: str) -> Source:
    found = read_json(folder / "summary.json", SUMMARY, FIX, check_summary)
    cells = evaluation_cells(found)
    for cell in cells:
        records = folder / "records" / f"{slug(cell['task'])}--{slug(cell['decoder'])}.jsonl"
        lengths = list(each_line(records, RECORD, FIX, itemgetter("length")))  # not the whole records at once
        curves = {key: np.array(curve, dtype=float) for key, curve in cell.get("curves", {}).items()}
        cell |= {"lengths": lengths, "curves": curves}
    facts = {"configuration": found["config"], "environment": found["environment"]}
    what = f"evaluation of {found['config']['model']['name']}, {found['config']['split']} split"
    return Source(name, what, facts, [evaluation_table(found)], cells)


def _read_run(folder: Path, name: str) -> Source:
    schema = {"objective?": str, "decoder": str, "seed": COUNT, "per_device_train_batch_size": POSITIVE}
    config = {"objective": "distill", **read_yaml(folder / "config.yaml", "the config", schema)}
    entries = read_lines(folder / "metrics.jsonl", METRICS, FIX)
    if not entries:
        raise UserError(f"{folder / 'metrics.jsonl'} is empty: let the run make its first update")
    rollouts = sum(bool({"reward", "agreement"} & entry.keys()) for entry in entries)
    costs = {
        "updates": max(e["step"] for e in entries),
        "completions": rollouts * config["per_device_train_batch_size"],
    }
    if times := read_lines(folder / "times.jsonl", TIMES, FIX):
        costs |= {key: sum(t.get(key, 0) for t in times) for key in ("seconds_rollout", "seconds_update")}
    settings = {k: v for k, v in config.items() if k not in _NOT_SETTINGS}
    metrics = by_update(entries, folder / "metrics.jsonl")
    run = {"name": name, "settings": settings, "metrics": metrics, **costs}
    what = f"training with {config['objective']} along {config['decoder']}, seed {config['seed']}"
    return Source(name, what, {"configuration": config}, runs=[run])
