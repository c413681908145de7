"""Folders of ``unmask eval`` and ``unmask rl`` as rows, frames and tables. Nothing is drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unmask.errors import UserError
from unmask.io.files import each_line, read_json, read_lines, read_yaml, slug
from unmask.io.schema import COUNT, METRICS, POSITIVE, RECORD, SUMMARY, TIMES, check_summary
from unmask.results.tables import Table, evaluation_table, percent, plain

Values = dict[str, Any]
_FIX = "choose a complete folder"
_FOLDERS = "choose a folder of unmask rl or unmask eval"
_NOT_SETTINGS = ("seed", "output_dir", "eval_steps", "save_steps", "report_to", "log_completions", "rows_per_forward")


@dataclass(frozen=True)
class Folder:
    """A folder as the report shows it: ``what`` it is, ``facts`` (title -> value for JSON), its main tables."""

    name: str
    what: str
    facts: dict[str, Any]
    tables: list[Table] = field(default_factory=list)


@dataclass
class Material:
    """All that a report shows, rows of equal settings under one ``label``.

    ``cells``: a row a task and decoder: the numbers of a summary, ``lengths`` (tokens before the first end token, one a
    problem) and ``curves`` (name -> array; NaN: nothing there). ``runs``: a row a training: settings, costs and ``metrics``, a
    frame by update.
    """

    folders: list[Folder] = field(default_factory=list)
    cells: list[Values] = field(default_factory=list)
    runs: list[Values] = field(default_factory=list)


def collect(folders: Sequence[Path]) -> Material:
    """Read folders, which may be of different kinds.

    Raises:
        UserError: for a folder that is of neither kind, named twice, empty, unfinished or damaged.
    """
    material = Material()
    names = _names(folders)
    for folder, name in zip(folders, names, strict=True):
        if not folder.is_dir():
            raise UserError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}: {_FOLDERS}")
        there = {path.name for path in folder.iterdir()}
        if {"config.yaml", "metrics.jsonl"} <= there:
            _read_run(folder, name, material)
        elif {"config.json", "summary.json"} <= there:
            _read_evaluation(folder, name, material)
        elif {"config.json", "records"} <= there:
            raise UserError(f"{folder} holds an evaluation that is not finished: start its unmask eval command again")
        else:
            raise UserError(
                f"{folder} holds no reinforcement-learning run (config.yaml, metrics.jsonl) and no evaluation (config.json, "
                f"summary.json): {_FOLDERS}"
            )
    for cell in material.cells:
        cell["label"] += f" · {cell['folder']}" * (len({c["folder"] for c in material.cells}) > 1)
    label_runs(material.runs)
    return material


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    if twice := next((f for i, f in enumerate(folders) if parts[i] in parts[:i]), None):
        raise UserError(f"{twice} is named twice: name it once")
    tails = (["/".join(p[-depth:]) for p in parts] for depth in range(1, max(map(len, parts)) + 1))
    return next(names for names in tails if len(set(names)) == len(names))


def evaluation_cells(found: Values) -> list[Values]:
    """The cells of an evaluation's summary as ``figures.accuracy`` draws them."""
    return [{"label": cell["decoder"], **cell} for cell in found["cells"]]


def _read_evaluation(folder: Path, name: str, material: Material) -> None:
    found = read_json(folder / "summary.json", SUMMARY, _FIX, check_summary)
    for cell in evaluation_cells(found):
        records = folder / "records" / f"{slug(cell['task'])}--{slug(cell['decoder'])}.jsonl"
        lengths = list(each_line(records, RECORD, _FIX, itemgetter("length")))  # not the whole records at once
        curves = {key: np.array(curve, dtype=float) for key, curve in cell.get("curves", {}).items()}
        material.cells.append({**cell, "folder": name, "lengths": lengths, "curves": curves})
    facts = {"configuration": found["config"], "environment": found["environment"]}
    what = f"evaluation of {found['config']['model']['name']}, {found['config']['split']} split"
    material.folders.append(Folder(name, what, facts, [evaluation_table(found)]))


def _read_run(folder: Path, name: str, material: Material) -> None:
    schema = {"objective": str, "decoder": str, "seed": COUNT, "per_device_train_batch_size": POSITIVE}
    config = read_yaml(folder / "config.yaml", "the config", schema)
    entries = read_lines(folder / "metrics.jsonl", METRICS, _FIX)
    if not entries:
        raise UserError(f"{folder / 'metrics.jsonl'} is empty: let the run make its first update")
    rollouts = sum("reward" in entry for entry in entries)
    costs = {
        "updates": max(e["step"] for e in entries),
        "completions": rollouts * config["per_device_train_batch_size"],
    }
    if times := read_lines(folder / "times.jsonl", TIMES, _FIX):
        costs |= {key: sum(t.get(key, 0) for t in times) for key in ("seconds_rollout", "seconds_update")}
    settings = {k: v for k, v in config.items() if k not in _NOT_SETTINGS}
    metrics = by_update(entries, folder / "metrics.jsonl")
    material.runs.append({"name": name, "settings": settings, "metrics": metrics, **costs})
    what = f"training with {config['objective']} along {config['decoder']}, seed {config['seed']}"
    material.folders.append(Folder(name, what, {"configuration": config}))


def by_update(entries: Sequence[Values], path: Path) -> pd.DataFrame:
    """The metrics of a run by update; what is not finite, as a diverging run logs it, is absent."""
    metrics = pd.DataFrame(entries).replace([np.inf, -np.inf], np.nan).groupby("step").last().dropna(axis=1, how="all")
    if not {"reward", "eval_reward"} & set(metrics):
        raise UserError(f"{path} holds no rewards among the metrics: {_FIX}")
    return metrics


def task_of(key: str) -> str:
    """``eval_sudoku_solved`` -> ``sudoku``."""
    return key.removeprefix("eval_").removesuffix("_solved")


def runs_table(runs: Sequence[Values]) -> Table:
    """First, best and last validation accuracy of every run, and what it took."""
    costs = {"updates": "updates", "completions": "completions sampled", "training_passes": "passes, at most"}
    costs |= {"seconds_rollout": "seconds in rollouts", "seconds_update": "seconds in updates"}
    rows = []
    for run in runs:
        names = [run["name"], *(plain(run["settings"].get(key)) for key in ("objective", "decoder"))]
        for key in (k for k in run["metrics"] if k.endswith("_solved")):
            curve = run["metrics"][key].dropna()
            best = f"{percent(curve.max())} % ({curve.idxmax()})"
            shares = [f"{percent(curve.iloc[0])} %", best, f"{percent(curve.iloc[-1])} %"]
            rows.append([*names, task_of(key), *shares, *(f"{run[k]:,.10g}" if k in run else "" for k in costs)])
    headings = ["run", "objective", "decoder", "validation", "first", "best (update)", "last", *costs.values()]
    return Table(headings, rows, 4, "Validation accuracy and cost").without_empty()


def varying(rows: Sequence[Values]) -> list[str]:
    """The keys in which rows differ, among those that all have: an older file may lack a setting."""
    return [k for k in rows[0] if all(k in row for row in rows) and len({str(row[k]) for row in rows}) > 1]


def setting(values: Values, keys: Sequence[str]) -> str:
    """The values of some settings in few words: texts as they are, others with their name."""
    return ", ".join(values[k] if isinstance(values[k], str) else f"{k}={plain(values[k])}" for k in keys)


def label_runs(runs: Sequence[Values]) -> None:
    """Label runs by the settings in which they differ; where there is none, by objective and decoder."""
    keys = varying([run["settings"] for run in runs]) if runs else []
    for run in runs:
        run["label"] = setting(run["settings"], keys or ["objective", "decoder"])
