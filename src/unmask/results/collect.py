"""Folders of ``unmask eval``, ``unmask rl`` and ``unmask study`` as frames and tables. Nothing is drawn here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unmask.config import build
from unmask.errors import UserError, unknown
from unmask.io.files import each_line, read_json, read_lines, read_yaml, slug
from unmask.io.schema import COUNT, CURVES, METRICS, POSITIVE, RECORD, SUMMARY, TIMES, check_summary
from unmask.results import pivot, summary
from unmask.results.pivot import PLAN, SEEDS, Values
from unmask.results.tables import Table, evaluation_table, percent, plain

_FIX = "choose a complete folder"
_FOLDERS = "choose a folder of unmask rl, unmask eval or unmask study"
_NOT_SETTINGS = (*SEEDS, "output_dir", "eval_steps", "save_steps", "report_to", "log_completions", "rows_per_forward")


@dataclass(frozen=True)
class Folder:
    """A folder as the report shows it: ``what`` it is, ``facts`` (title -> value for JSON), its main tables and a remark."""

    name: str
    what: str
    facts: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    differences: list[Table] = field(default_factory=list)
    note: str = ""


@dataclass
class Material:
    """All that a report shows, rows of equal settings under one ``label``.

    ``cells``: a row a task and decoder: folder, axes, the numbers of a summary, ``lengths`` (tokens before the first end token,
    one a problem and seed) and ``curves`` (name -> array; NaN: nothing there). ``runs``: a row a training: settings, costs and
    ``metrics``, a frame by update. ``differences``: rows of a study's summary with their ``folder``.
    """

    folders: list[Folder] = field(default_factory=list)
    cells: list[Values] = field(default_factory=list)
    runs: list[Values] = field(default_factory=list)
    differences: list[Values] = field(default_factory=list)


def collect(folders: Sequence[Path]) -> Material:
    """Read folders, which may be of different kinds.

    Raises:
        UserError: for a folder that is none of the three kinds, named twice, empty, unfinished or damaged.
    """
    material = Material()
    for folder, name in zip(folders, _names(folders), strict=True):
        _reader(folder)(folder, name, material)
    for rows, own in ((material.cells, "axes"), (material.runs, "settings")):
        _label(rows, own)
    return material


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    if twice := next((f for i, f in enumerate(folders) if parts[i] in parts[:i]), None):
        raise UserError(f"{twice} is named twice: name it once")
    tails = (["/".join(p[-depth:]) for p in parts] for depth in range(1, max(map(len, parts)) + 1))
    return next(names for names in tails if len(set(names)) == len(names))


def _reader(folder: Path) -> Callable[[Path, str, Material], None]:
    if not folder.is_dir():
        raise UserError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}: {_FOLDERS}")
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
        f"summary.json) and no study (cells.jsonl): {_FOLDERS}"
    )


def evaluation_cells(found: Values) -> list[Values]:
    """The cells of an evaluation's summary as ``figures.accuracy`` draws them."""
    return [{"axes": {}, "label": cell["decoder"], "seeds": 1, **cell} for cell in found["cells"]]


def _read_evaluation(folder: Path, name: str, material: Material) -> None:
    found = read_json(folder / "summary.json", SUMMARY, _FIX, check_summary)
    for cell in evaluation_cells(found):
        records = folder / "records" / f"{slug(cell['task'])}--{slug(cell['decoder'])}.jsonl"
        lengths = list(each_line(records, RECORD, _FIX, itemgetter("length")))  # not the whole records at once
        curves = _mean_curves([cell["curves"]] if "curves" in cell else [])
        material.cells.append({**cell, "folder": name, "lengths": lengths, "curves": curves})
    facts = {"configuration": found["config"], "environment": found["environment"]}
    what = f"evaluation of {found['config']['model']['name']}, {found['config']['split']} split"
    material.folders.append(Folder(name, what, facts, [evaluation_table(found)]))


def _mean_curves(found: Sequence[Values]) -> dict[str, np.ndarray]:
    """Means over the seeds of a cell that have a value; a curve is as long as the longest of its seeds'."""
    return {key: _mean([np.array(curves[key], dtype=float) for curves in found]) for key in CURVES} if found else {}


def _mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    padded = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), np.nan)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    there = ~np.isnan(padded)
    with np.errstate(invalid="ignore"):
        return np.where(there, padded, 0).sum(0) / there.sum(0)


def _read_study(folder: Path, name: str, material: Material) -> None:
    lines = summary.read_cells(folder)
    config = _study_file(folder / "study.yaml", lines)
    chosen = [build(pivot.Pivot, table, "tables") for table in config.get("tables", [])]
    found = summary.summarize_study(lines, config.get("compare", []), config.get("baselines", []), chosen)
    for entry, group in zip(found["cells"], summary.groups_of(lines).values(), strict=True):
        axes = {k: v for k, v in entry["cell"].items() if k not in ("task", "decoder")}
        curves = _mean_curves([line["curves"] for line in group.lines if "curves" in line])
        own = {"lengths": [n for line in group.lines for n in line["length"]], "curves": curves}
        names = {key: entry["cell"][key] for key in ("task", "decoder")}
        material.cells.append({**entry, **names, **own, "folder": name, "axes": axes})
    material.differences += [{"folder": name, **d} for d in found["differences"]]
    for line in summary.run_lines(folder / "runs.jsonl"):
        settings = {k.removeprefix("train."): v for k, v in line["train"].items() if k not in SEEDS}
        costs = {**line["budget"], **{f"seconds_{k}": v for k, v in line["seconds"].items()}}
        metrics = _by_update(line["metrics"], folder / "runs.jsonl")
        run = {"folder": name, "name": line["key"], "settings": settings, "metrics": metrics, **costs}
        material.runs.append(run)
    environments = pivot.distinct(line["environment"] for line in lines)
    facts = {"configuration": config} if config else {}
    facts |= {f"environment{f' {i}' if len(environments) > 1 else ''}": e for i, e in enumerate(environments, 1)}
    what = f"study, {len(lines)} cells along {', '.join(found['axes'])}"
    tables = [*pivot.tables(chosen, found), summary.cells_table(found)]
    differences = summary.difference_tables(found)
    material.folders.append(Folder(name, what, facts, tables, differences, summary.said(found) if differences else ""))


def _study_file(path: Path, lines: Sequence[Values]) -> Values:
    """A study's file, if it is there, with axes that its cells have."""
    if not path.is_file():
        return {}
    table = {"title": str, "rows": [str], **{f"{key}?": [str] for key in ("columns", "mean_over")}, "where?": dict}
    config = read_yaml(path, "the study", {"compare?": [str], "baselines?": [str], "tables?": [table]})
    keys = ("rows", "columns", "where", "mean_over")
    named = [axis for t in config.get("tables", []) for key in keys for axis in t.get(key, ())]
    for axis in (*config.get("compare", ()), *named):
        if axis not in (known := [*lines[0]["cell"], PLAN]):
            raise unknown(f"axis in {path}", axis, known)
    return config


def _by_update(entries: Sequence[Values], path: Path) -> pd.DataFrame:
    """The metrics of a run by update; what is not finite, as a diverging run logs it, is absent."""
    metrics = pd.DataFrame(entries).replace([np.inf, -np.inf], np.nan).groupby("step").last().dropna(axis=1, how="all")
    if not {"reward", "eval_reward"} & set(metrics):
        raise UserError(f"{path} holds no rewards among the metrics: {_FIX}")
    return metrics


def _read_run(folder: Path, name: str, material: Material) -> None:
    schema = {"objective": str, "decoder": str, "seed": COUNT, "per_device_train_batch_size": POSITIVE}
    config = read_yaml(folder / "config.yaml", "the config", schema)
    entries = read_lines(folder / "metrics.jsonl", METRICS, _FIX)
    if not entries:
        raise UserError(f"{folder / 'metrics.jsonl'} is empty: let the run make its first update")
    metrics = _by_update(entries, folder / "metrics.jsonl")
    rollouts = sum("reward" in entry for entry in entries)
    costs = {
        "updates": max(e["step"] for e in entries),
        "completions": rollouts * config["per_device_train_batch_size"],
    }
    times = read_lines(folder / "times.jsonl", TIMES, _FIX)
    if times:
        costs |= {key: sum(t.get(key, 0) for t in times) for key in ("seconds_rollout", "seconds_update")}
    settings = {k: v for k, v in config.items() if k not in _NOT_SETTINGS}
    material.runs.append({"folder": "", "name": name, "settings": settings, "metrics": metrics, **costs})
    what = f"training with {config['objective']} along {config['decoder']}, seed {config['seed']}"
    material.folders.append(Folder(name, what, {"configuration": config}))


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


# ---- names -----------------------------------------------------------------------------------------------------------------


def _untrained(axes: Values) -> bool:
    return all(v is None for k, v in axes.items() if k.startswith("train."))


def varying(rows: Sequence[Values]) -> list[str]:
    """The keys that tell rows apart, among those that all have: an older file may lack a setting.

    What only sets a trained model apart from one that is not counts once.
    """
    trained = [row for row in rows if not _untrained(row)]
    found = []
    for key in (k for k in rows[0] if all(k in row for row in rows)):
        among = trained if key.startswith("train.") else rows
        if len({str(row[key]) for row in among}) > 1:
            found.append(key)
    if 0 < len(trained) < len(rows) and not any(k.startswith("train.") for k in found):
        found += [k for k in trained[0] if k.startswith("train.")][:1]
    return found


def setting(axes: Values, keys: Sequence[str]) -> str:
    """The values of some axes in few words; a model that was not trained is called so."""
    untrained = any(k.startswith("train.") for k in keys) and _untrained(axes)
    words = []
    for key in (k for k in keys if not (untrained and k.startswith("train."))):
        value = axes[key]
        words.append(value if isinstance(value, str) else f"{key.removeprefix('train.')}={plain(value)}")
    return ", ".join([*words, *["untrained"] * untrained])


def difference_names(rows: Sequence[Values]) -> list[str]:
    """``countdown: cj − untrained (full)``: what differs, and in brackets what else tells the rows apart."""
    telling = varying([row[side] for row in rows for side in ("cell", "against")])
    names = []
    for row in rows:
        apart = [k for k in telling if row["cell"][k] != row["against"][k]]
        rest = setting(row["cell"], [k for k in telling if k not in (*apart, "task")])
        ours, theirs = (setting(row[side], apart) for side in ("cell", "against"))
        names.append(f"{row['cell']['task']}: {ours} − {theirs}" + (f" ({rest})" if rest else ""))
    return names


def _label(rows: Sequence[Values], own: str) -> None:
    """Give rows their ``label``: the decoder of a cell, what else varies in the folder, the folder where there are several."""
    folders = list(dict.fromkeys(row["folder"] for row in rows))
    for folder in folders:
        there = [row for row in rows if row["folder"] == folder]
        keys = varying([row[own] for row in there])
        for row in there:
            values, shown = row[own], keys
            if own == "settings":
                shown = keys or ["objective", "decoder"]
            else:
                shown = [k for k in keys if values[k] is not None or k.startswith("train.")]
            words = setting(
                {k: values.get(k) for k in shown} | {k: v for k, v in values.items() if "train." in k}, shown
            )
            parts = [row["decoder"] if own == "axes" else "", words, folder if len(folders) > 1 else ""]
            row["label"] = " · ".join(filter(None, parts))
