"""Figures and one HTML file of a study, from its cells alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study import PLAN, SEEDS, Values, distinct
from benchmarks.study.lines import read_cells, run_lines
from benchmarks.study.summary import groups_of
from benchmarks.study.tables import ALPHA, cells_table, describe, difference_tables, pivots, read_out
from unmask.io.files import read_yaml, slug
from unmask.results.collect import Folder, Material, by_update, label_runs, setting, varying
from unmask.results.figures import ROWS, Picture, pieces
from unmask.results.report import Section, write_report
from unmask.results.style import INK, SOFT, look


def report(folder: Path, output: Path) -> tuple[str, list[Path]]:
    """Write a study's figures and report.html into ``output``; returns its tables as Markdown, and the files.

    Raises:
        UserError: for a folder that holds no cells, or whose study.yaml names what they do not have.
    """
    return write_report(*collect_study(folder), output)


def collect_study(folder: Path) -> tuple[Material, list[Section]]:
    """A study as ``write_report`` takes it: its cells and trainings, and a section of its paired differences."""
    lines = read_cells(folder)
    config: Values = {}
    if (folder / "study.yaml").is_file():
        schema = {"compare?": [str], "baselines?": [str], "tables?": [dict]}
        config = read_yaml(folder / "study.yaml", "the study", schema)
    settings = [{**line["cell"], PLAN: line["budget"]["nfe"]} for line in lines]
    compared = config.get("compare", []), config.get("baselines", [])
    chosen = pivots(config.get("tables", []), settings, *compared, finished=False)
    found, tables = read_out(lines, *compared, chosen)
    material = Material()
    for cell, label, group in zip(found["cells"], cell_labels(found["cells"]), groups_of(lines).values(), strict=True):
        own = {"lengths": [n for line in group.lines for n in line["length"]], "curves": mean_curves(group.lines)}
        material.cells.append({**cell, "task": cell["cell"]["task"], "label": label, **own})
    for line in run_lines(folder / "runs.jsonl"):
        axes = {k.removeprefix("train."): v for k, v in line["train"].items() if k not in SEEDS}
        metrics = by_update(line["metrics"], folder / "runs.jsonl")
        costs = {**line["budget"], **{f"seconds_{k}": v for k, v in line["seconds"].items()}}
        material.runs.append({"name": line["key"], "settings": axes, "metrics": metrics, **costs})
    label_runs(material.runs)
    facts = {"configuration": config} if config else {}
    facts |= {f"environment {i}": e for i, e in enumerate(distinct(line["environment"] for line in lines), 1)}
    what = f"study, {len(lines)} cells along {', '.join(found['axes'])}"
    material.folders.append(Folder(folder.resolve().name, what, facts, [*tables, cells_table(found)]))
    pictures = difference_pictures(found["differences"])
    return material, [Section("differences", "Paired differences", describe(found), difference_tables(found), pictures)]


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


# ---- differences -----------------------------------------------------------------------------------------------------------


def difference_pictures(differences: Sequence[Values]) -> list[Picture]:
    """Paired differences in problems solved, a figure (of up to 30 rows) for each axis."""
    pictures = []
    titles = {"training": "untrained", "equal passes": "the baseline of as many passes"}
    for axis in dict.fromkeys(row["axis"] for row in differences):
        own = [row for row in differences if row["axis"] == axis]
        title = f"{axis}: each against {titles.get(axis, 'its first value')}"
        for part, rows in pieces(list(zip(own, difference_names(own), strict=True)), ROWS):
            pictures.append(Picture(f"differences-{slug(axis)}{part}", *_draw(rows, title)))
    return pictures


@look()
def _draw(rows: Sequence[tuple[Values, str]], title: str) -> tuple[str, Figure]:
    width = max(8.5, 5 + 0.08 * max(len(name) for _, name in rows))
    figure = Figure(figsize=(width, 0.3 * len(rows) + 1.3), layout="constrained")
    axis = figure.subplots()
    clear = [row["solved_holm"] < ALPHA for row, _ in rows]
    for y, ((row, _), filled) in enumerate(zip(rows, clear, strict=True)):
        axis.plot([100 * v for v in row["solved_interval"]], [y, y], color=INK, linewidth=1.3)
        axis.plot(100 * row["solved"], y, "o", color=INK, markersize=6, markerfacecolor=INK if filled else "white")
    axis.axvline(0, color=SOFT, linewidth=1)
    axis.set_yticks(range(len(rows)), [name for _, name in rows])
    axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel="difference in problems solved (percentage points), 95 % interval")
    axis.grid(axis="y", visible=False)
    axis.set_title(title)
    return (
        f"{title}. Paired differences on the same problems; {sum(clear)} of {len(rows)} are clear after Holm's adjustment "
        f"(filled, p < {ALPHA}), the others are hollow."
    ), figure
