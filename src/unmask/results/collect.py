"""Folders of ``unmask eval``, ``unmask rl`` and ``unmask study`` as plain data. Nothing is drawn here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from unmask.config import build
from unmask.errors import UserError, unknown
from unmask.io.files import each_line, read_json, read_lines, read_yaml, slug
from unmask.io.schema import COUNT, CURVES, METRICS, POSITIVE, RECORD, SUMMARY, TIMES, whole_summary
from unmask.results.axes import PLAN, SEEDS
from unmask.results.pivot import Pivot, RenderedTable, plain, tables
from unmask.results.summary import groups_of, read_cells, run_lines, summarize_study

Curve = dict[int, float]
_FIX = "give a whole folder"
_FOLDERS = "a folder of unmask rl, unmask eval or unmask study"
_NOT_SETTINGS = (*SEEDS, "output_dir", "eval_steps", "save_steps", "report_to", "log_completions", "rows_per_forward")


@dataclass(frozen=True)
class Folder:
    """What a folder is, in a few words, and the facts that the report lists: title -> value for JSON."""

    name: str
    what: str
    facts: dict[str, Any]


@dataclass
class Result:
    """One task under one decoder: the numbers of a summary's cell, over all seeds of a study."""

    folder: str
    task: str
    decoder: str
    axes: dict[str, Any]
    """What else tells the cell from others of its folder."""
    numbers: dict[str, Any]
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    """``eos_share``, ``end_confidence``, ``other_confidence``: (steps,); ``order``: (time, position). NaN: nothing there."""
    lengths: list[int] = field(default_factory=list)
    """Tokens before the first end token, one a problem and seed."""
    label: str = ""


@dataclass
class Run:
    """One training: its curves over the updates by name."""

    folder: str
    name: str
    settings: dict[str, Any]
    curves: dict[str, Curve]
    costs: dict[str, float]
    label: str = ""


@dataclass
class Material:
    """All that a report shows."""

    folders: list[Folder] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    tables: list[tuple[str, RenderedTable]] = field(default_factory=list)
    """Tables for reading that a study's file asks for, with the folder's name."""
    notes: dict[str, str] = field(default_factory=dict)
    """Folder name -> what its study says of its comparisons."""


def collect(folders: Sequence[Path]) -> Material:
    """Read folders, which may be of different kinds.

    Raises:
        UserError: for a folder that is none of the three kinds, given twice, empty, unfinished or damaged.
    """
    material = Material()
    for folder, name in zip(folders, _names(folders), strict=True):
        _reader(folder)(folder, name, material)
    _label_results(material.results)
    _label_runs(material.runs)
    return material


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for twice in (i for i, p in enumerate(parts) if p in parts[:i]):
        raise UserError(f"{folders[twice]} is given twice: give it once")
    depths = range(1, max(map(len, parts)) + 1)
    tails = (["/".join(p[-depth:]) for p in parts] for depth in depths)
    return next(names for names in tails if len(set(names)) == len(names))


def _reader(folder: Path) -> Callable[[Path, str, Material], None]:
    if not folder.is_dir():
        raise UserError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}: give {_FOLDERS}")
    kinds = {
        ("cells.jsonl",): _read_study,
        ("config.yaml", "metrics.jsonl"): _read_run,
        ("config.json", "summary.json"): _read_evaluation,
    }
    for files, read in kinds.items():
        if all((folder / file).is_file() for file in files):
            return read
    if (folder / "config.json").is_file() and (folder / "records").is_dir():
        raise UserError(f"{folder} holds an evaluation that is not finished: start its unmask eval command again")
    raise UserError(
        f"{folder} holds no reinforcement-learning run (config.yaml, metrics.jsonl), no evaluation (config.json, "
        f"summary.json) and no study (cells.jsonl): give {_FOLDERS}"
    )


def _read_evaluation(folder: Path, name: str, material: Material) -> None:
    summary = read_json(folder / "summary.json", SUMMARY, _FIX, whole_summary)
    config = summary["config"]
    for cell in summary["cells"]:
        records = folder / "records" / f"{slug(cell['task'])}--{slug(cell['decoder'])}.jsonl"
        numbers = {"seeds": 1, **cell}
        curves = _curves([cell["curves"]]) if "curves" in cell else {}
        lengths = list(each_line(records, RECORD, _FIX, itemgetter("length")))  # not the whole records at once
        material.results.append(Result(name, cell["task"], cell["decoder"], {}, numbers, curves, lengths))
    what = f"evaluation of {config['model']['name']}, {config['split']} split"
    facts = {"configuration": config, "environment": summary["environment"]}
    material.folders.append(Folder(name, what, facts))


def _curves(found: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The curves of a cell's seeds as their mean; where only some seeds have a value, of those."""
    return {key: _mean([np.array(c[key], dtype=float) for c in found]) for key in CURVES} if found else {}


def _mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Of arrays whose first sizes may differ; NaN counts as absent."""
    table = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), np.nan)
    for row, array in zip(table, arrays, strict=True):
        row[: len(array)] = array
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.where(there, table, 0).sum(0) / there.sum(0)


def _read_study(folder: Path, name: str, material: Material) -> None:
    cells = read_cells(folder)
    config = _settings(folder / "study.yaml", cells)
    chosen = [build(Pivot, table, "tables") for table in config.get("tables", [])]
    summary = summarize_study(cells, config.get("compare", []), config.get("baselines", []), chosen)
    for entry, group in zip(summary["cells"], groups_of(cells).values(), strict=True):
        lines = group.lines
        axes = {k: v for k, v in entry["cell"].items() if k not in ("task", "decoder")}
        numbers = {"score_name": lines[0]["score_name"], "seconds": sum(line["seconds"] for line in lines), **entry}
        curves = _curves([line["curves"] for line in lines if "curves" in line])
        lengths = [length for line in lines for length in line["length"]]
        task, decoder = entry["cell"]["task"], entry["cell"]["decoder"]
        material.results.append(Result(name, task, decoder, axes, numbers, curves, lengths))
    material.tables += [(name, table) for table in tables(chosen, summary)]
    if summary["differences"]:
        material.differences += [{"folder": name, **d} for d in summary["differences"]]
        material.notes[name] = summary["note"]
    for line in run_lines(folder / "runs.jsonl"):
        settings = {k.removeprefix("train."): v for k, v in line["train"].items() if k not in SEEDS}
        costs = {**line["budget"], **{f"seconds_{k}": v for k, v in line["seconds"].items()}}
        material.runs.append(
            Run(name, line["key"], settings, _by_update(line["metrics"], folder / "runs.jsonl"), costs)
        )
    facts = {"configuration": config} if config else {}
    environments = {json.dumps(line["environment"]): line["environment"] for line in cells}
    many = len(environments) > 1
    facts |= {f"environment{f' {i}' if many else ''}": e for i, e in enumerate(environments.values(), 1)}
    what = f"study, {len(cells)} cells along {', '.join(summary['axes'])}"
    material.folders.append(Folder(name, what, facts))


def _settings(path: Path, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A study's file, if it is there, with axes that its cells have."""
    if not path.is_file():
        return {}
    table = {"title": str, "rows": [str], **{f"{key}?": [str] for key in ("columns", "mean_over")}, "where?": dict}
    config = read_yaml(path, "the study", {"compare?": [str], "baselines?": [str], "tables?": [table]})
    named = [
        axis
        for t in config.get("tables", [])
        for k in ("rows", "columns", "where", "mean_over")
        for axis in t.get(k, ())
    ]
    for axis in (*config.get("compare", ()), *named):
        if axis not in (known := [*cells[0]["cell"], PLAN]):
            raise unknown(f"axis in {path}", axis, known)
    return config


def _by_update(entries: Sequence[dict[str, Any]], path: Path) -> dict[str, Curve]:
    """The curves of a run's metrics; what is not finite, as a diverging run logs it, has no point."""
    curves: dict[str, Curve] = {}
    for entry in entries:
        for key, value in entry.items():
            if key != "step" and math.isfinite(value):
                curves.setdefault(key, {})[entry["step"]] = value
    if not {"reward", "eval_reward"} & set(curves):
        raise UserError(f"{path} holds no rewards among the metrics: {_FIX}")
    return curves


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
    times = read_lines(folder / "times.jsonl", TIMES, _FIX)
    if times:
        costs |= {key: sum(t.get(key, 0) for t in times) for key in ("seconds_rollout", "seconds_update")}
    settings = {k: v for k, v in config.items() if k not in _NOT_SETTINGS}
    what = f"training with {config['objective']} along {config['decoder']}, seed {config['seed']}"
    material.runs.append(Run("", name, settings, _by_update(entries, folder / "metrics.jsonl"), costs))
    material.folders.append(Folder(name, what, {"configuration": config}))


# ---- names -----------------------------------------------------------------------------------------------------------------


def _of_training(table: dict[str, Any]) -> list[str]:
    return [k for k in table if k.startswith("train.")]


def _untrained(table: dict[str, Any]) -> bool:
    return all(table[k] is None for k in _of_training(table))


def varying(tables: Sequence[dict[str, Any]]) -> list[str]:
    """The keys that tell tables apart, among those that all have: an older file may lack a setting.

    What only sets a trained model apart from one that is not counts once.
    """
    trained = [t for t in tables if not _untrained(t)]
    found = []
    for key in (k for k in tables[0] if all(k in t for t in tables)):
        among = trained if key.startswith("train.") else tables
        if len({str(t[key]) for t in among}) > 1:
            found.append(key)
    if 0 < len(trained) < len(tables) and not any(k.startswith("train.") for k in found):
        found += _of_training(trained[0])[:1]
    return found


def setting(axes: dict[str, Any], keys: Sequence[str]) -> str:
    """The values of some axes in few words; a model that was not trained is called so."""
    training = [k for k in keys if k.startswith("train.")]
    untrained = bool(training) and _untrained(axes)
    words = []
    for key in keys:
        if not (untrained and key in training):
            value = axes[key]
            words.append(value if isinstance(value, str) else f"{key.removeprefix('train.')}={plain(value)}")
    return ", ".join([*words, *["untrained"] * untrained])


def differing(difference: dict[str, Any]) -> list[str]:
    """The axes in which a cell differs from the one it is compared with: one, or all of a training."""
    return [k for k, v in difference["cell"].items() if v != difference["against"][k]]


def _label_results(results: Sequence[Result]) -> None:
    """Decoder, what else is set and varies in the folder, and the folder where there are several with results."""
    folders = {
        folder: [r for r in results if r.folder == folder] for folder in dict.fromkeys(r.folder for r in results)
    }
    for folder, own in folders.items():
        keys = varying([r.axes for r in own])
        for result in own:
            there = [k for k in keys if result.axes[k] is not None or k.startswith("train.")]
            parts = [result.decoder, setting(result.axes, there), folder if len(folders) > 1 else ""]
            result.label = " · ".join(filter(None, parts))


def _label_runs(runs: Sequence[Run]) -> None:
    """What tells runs of the same origin apart, seeds aside, and a study's name where it stands beside others."""
    origins = {origin: [r for r in runs if r.folder == origin] for origin in dict.fromkeys(r.folder for r in runs)}
    for origin, own in origins.items():
        keys = varying([r.settings for r in own]) or ["objective", "decoder"]
        for run in own:
            words = setting({k: run.settings.get(k) for k in keys}, keys)
            run.label = f"{words} · {origin}" if origin and len(origins) > 1 else words
