"""A study as a source of a report, from its lines alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.report.source import Source, by_update, label_runs, setting, varying
from benchmarks.study import PLAN, SEEDS, Values, distinct
from benchmarks.study.lines import read_cells, run_lines
from benchmarks.study.summary import groups_of
from benchmarks.study.tables import cells_table, describe, difference_tables, pivots, read_out
from unmask.io.files import read_yaml


def read_study(folder: Path, name: str) -> Source:
    """A study's folder. Raises UserError where it holds no cells, or its study.yaml names what they do not have."""
    lines = read_cells(folder)
    config: Values = {}
    if (folder / "study.yaml").is_file():
        schema = {"compare?": [str], "baselines?": [str], "tables?": [dict]}
        config = read_yaml(folder / "study.yaml", "the study", schema)
    settings = [{**line["cell"], PLAN: line["budget"]["nfe"]} for line in lines]
    compared = config.get("compare", []), config.get("baselines", [])
    chosen = pivots(config.get("tables", []), settings, *compared, finished=False)
    found, tables = read_out(lines, *compared, chosen)
    facts = {"configuration": config} if config else {}
    facts |= {f"environment {i}": e for i, e in enumerate(distinct(line["environment"] for line in lines), 1)}
    source = Source(
        name, f"study, {len(lines)} cells along {', '.join(found['axes'])}", facts, [*tables, cells_table(found)]
    )
    for cell, label, group in zip(found["cells"], cell_labels(found["cells"]), groups_of(lines).values(), strict=True):
        own = {"lengths": [n for line in group.lines for n in line["length"]], "curves": mean_curves(group.lines)}
        source.cells.append({**cell, "task": cell["cell"]["task"], "label": label, **own})
    for line in run_lines(folder / "runs.jsonl"):
        axes = {k.removeprefix("train."): v for k, v in line["train"].items() if k not in SEEDS}
        metrics = by_update(line["metrics"], folder / "runs.jsonl")
        costs = {**line["budget"], **{f"seconds_{k}": v for k, v in line["seconds"].items()}}
        source.runs.append({"name": line["key"], "settings": axes, "metrics": metrics, **costs})
    label_runs(source.runs)
    for axis in dict.fromkeys(d["axis"] for d in found["differences"]):
        rows = [d for d in found["differences"] if d["axis"] == axis]
        source.differences += zip(rows, difference_names(rows), strict=True)
    source.compared, source.note = difference_tables(found), describe(found)
    return source


def mean_curves(lines: Sequence[Values]) -> dict[str, np.ndarray]:
    """Means over the seeds of a cell that have a value; a curve is as long as the longest of its seeds'."""
    found = [line["curves"] for line in lines if "curves" in line]
    means = {}
    for key in found[0] if found else ():
        arrays = [np.array(curves[key], dtype=float) for curves in found]
        padded = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), np.nan)
        for row, array in zip(padded, arrays, strict=True):
            row[: len(array)] = array
        count = (~np.isnan(padded)).sum(0)
        means[key] = np.where(count, np.nansum(padded, axis=0) / np.maximum(count, 1), np.nan)
    return means


# ---- names -----------------------------------------------------------------------------------------------------------------


def in_words(axes: Values, keys: Sequence[str]) -> str:
    """The values of some axes in few words; a model that was not trained is called so."""
    untrained = all(v is None for k, v in axes.items() if k.startswith("train."))
    kept = [k for k in keys if not (untrained and k.startswith("train."))]
    words = setting({k.removeprefix("train."): axes[k] for k in kept}, [k.removeprefix("train.") for k in kept])
    return ", ".join(filter(None, [words, "untrained" * (len(kept) < len(keys))]))


def telling(rows: Sequence[Values]) -> list[str]:
    """The axes in which rows differ; what only sets a trained model apart from one that is not counts once."""
    of_training = [k for k in rows[0] if k.startswith("train.")]
    trained = [row for row in rows if any(row[k] is not None for k in of_training)]
    keys = [k for k in varying(rows) if k not in of_training or k in varying(trained)]
    once = of_training[:1] if 0 < len(trained) < len(rows) and not set(keys) & set(of_training) else []
    return [*keys, *once]


def cell_labels(cells: Sequence[Values]) -> list[str]:
    """The decoder of each cell, and what else varies."""
    axes = [{k: v for k, v in cell["cell"].items() if k not in ("task", "decoder")} for cell in cells]
    keys = telling(axes)
    words = [in_words(own, [k for k in keys if own[k] is not None or k.startswith("train.")]) for own in axes]
    return [" · ".join(filter(None, [c["cell"]["decoder"], w])) for c, w in zip(cells, words, strict=True)]


def difference_names(rows: Sequence[Values]) -> list[str]:
    """``countdown: cj − untrained (full)``: what differs, and in brackets what else tells the rows apart."""
    keys = telling([row[side] for row in rows for side in ("cell", "against")])
    names = []
    for row in rows:
        apart = [k for k in keys if row["cell"][k] != row["against"][k]]
        rest = in_words(row["cell"], [k for k in keys if k not in (*apart, "task")])
        ours, theirs = (in_words(row[side], apart) for side in ("cell", "against"))
        names.append(f"{row['cell']['task']}: {ours} − {theirs}" + (f" ({rest})" if rest else ""))
    return names
