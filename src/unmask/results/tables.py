"""Tables of a report: for the page with values to sort by, for the terminal as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unmask.results.accuracy import markdown, percent, points
from unmask.results.collect import Result, Run, differing, plain, setting, varying
from unmask.results.curves import task_of
from unmask.results.pivot import RenderedTable

_NOTHING = "–"
_BUDGET = {"updates": "updates", "completions": "completions sampled", "training_passes": "passes in training, at most"}


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number that it sorts by; text sorts as text."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """The first ``left`` columns are text, the others numbers; ``note`` stands below."""

    caption: str
    headings: list[str]
    rows: list[list[Cell]]
    left: int
    note: str = ""

    def markdown(self) -> str:
        return markdown(self.headings, [[cell.text for cell in row] for row in self.rows], self.left)


def _number(value: float | None, form: str = ",.1f") -> Cell:
    return Cell(_NOTHING) if value is None else Cell(format(value, form), value)


def _share(value: float, interval: Sequence[float]) -> Cell:
    return Cell(percent(value, list(interval)), value)


def _points(value: float, interval: Sequence[float]) -> Cell:
    return Cell(points(value, interval), value)


def _named(results: Sequence[Result]) -> tuple[list[str], list[list[Cell]]]:
    """The columns that tell results of one task apart: folder where there are several, decoder, the axes of studies."""
    several = len({r.folder for r in results}) > 1
    axes = list(dict.fromkeys(axis for r in results for axis in r.axes))
    rows = [[*([r.folder] * several), r.decoder, *(plain(r.axes.get(axis)) for axis in axes)] for r in results]
    return [*(["folder"] * several), "decoder", *axes], [[Cell(text) for text in row] for row in rows]


def chosen_tables(shown: Sequence[tuple[str, RenderedTable]]) -> list[Table]:
    """The tables for reading that studies ask for, by (folder, table)."""
    several = len({folder for folder, _ in shown}) > 1
    tables = []
    for folder, table in shown:
        caption = f"{folder}: {table.title}" if several else table.title
        rows = [
            [Cell(text) for text in row[: table.left]] + [_leading(t) for t in row[table.left :]] for row in table.rows
        ]
        tables.append(Table(caption, table.headings, rows, table.left, " ".join(table.notes)))
    return tables


def _leading(text: str) -> Cell:
    """A text that begins with a number, or is empty."""
    return Cell(text, float(text.split()[0]) if text else None)


def results_tables(results: Sequence[Result]) -> list[Table]:
    """A table a task: solved and score with their 95 % intervals, passes, lengths."""
    tables = []
    for task in dict.fromkeys(r.task for r in results):
        own = [r for r in results if r.task == task]
        names, first = _named(own)
        seeds = any(r.numbers["seeds"] > 1 for r in own)
        rows = []
        for row, numbers in zip(first, (r.numbers for r in own), strict=True):
            rows.append(
                [
                    *row,
                    _number(numbers["problems"], ","),
                    *[_number(numbers["seeds"], ",")] * seeds,
                    _number(numbers["nfe"]),
                    _share(numbers["solved"], numbers["solved_interval"]),
                    _share(numbers["score"], numbers["score_interval"]),
                    _number(numbers["tokens_per_forward"]),
                    _number(numbers["length"]),
                ]
            )
        score = own[0].numbers["score_name"]
        headings = [
            "problems",
            *["seeds"] * seeds,
            "NFE",
            "solved % [95 %]",
            f"{score} % [95 %]",
            "tokens/forward",
            "length",
        ]
        tables.append(Table(task, names + headings, rows, len(names)))
    return tables


def differences_title(rows: Sequence[dict[str, Any]]) -> str:
    """What is compared: along an axis with its first value, at equal passes with several baselines."""
    axis = rows[0]["axis"]
    other = "the baseline of as many" if axis == "equal passes" else setting(rows[0]["against"], differing(rows[0]))
    return f"{axis}: each against {other}"


def differences_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Paired differences along one axis of one study."""
    axes = list(dict.fromkeys(["task", *varying([row[side] for row in rows for side in ("cell", "against")])]))
    headings = [*axes, "NFE", "NFE against"]
    for metric in ("solved", "score"):
        headings += [f"{metric}, points [95 %]", "p", "p (Holm)"]
    cells = []
    for row in rows:
        line = [Cell(plain(row["cell"][axis])) for axis in axes] + [_number(nfe) for nfe in row["nfe"]]
        for metric in ("solved", "score"):
            line.append(_points(row[metric], row[f"{metric}_interval"]))
            line += [_number(row[f"{metric}_{kind}"], ".2g") for kind in ("p", "holm")]
        cells.append(line)
    return Table(differences_title(rows), headings, cells, len(axes))


def runs_table(runs: Sequence[Run]) -> Table:
    """First, best and last validation accuracy of every run."""
    rows = []
    for run in runs:
        for key in (k for k in run.curves if k.endswith("_solved")):
            curve = run.curves[key]
            first, best, last = min(curve), max(curve, key=lambda s: (curve[s], -s)), max(curve)
            shares = [Cell(f"{percent(curve[s])} %", curve[s]) for s in (first, best, last)]
            shares[1] = Cell(f"{shares[1].text} ({best})", curve[best])
            rows.append([*_run_names(run), _number(run.costs["updates"], ","), Cell(task_of(key)), *shares])
    headings = ["run", "objective", "decoder", "updates", "validation", "first", "best (update)", "last"]
    return Table("Validation accuracy", headings, rows, 5)


def _run_names(run: Run) -> list[Cell]:
    return [Cell(run.name), Cell(plain(run.settings.get("objective"))), Cell(plain(run.settings.get("decoder")))]


def evaluation_costs(results: Sequence[Result]) -> Table:
    """Passes and seconds of every result, and what its model's training took."""
    names, first = _named(results)
    rows = []
    for row, result in zip(first, results, strict=True):
        numbers, budget = result.numbers, result.numbers.get("budget", {})
        sequences, seconds = numbers["problems"] * numbers["seeds"], numbers["seconds"]
        passes = [_number(numbers["nfe"]), _number(numbers["nfe"] * sequences, ",.0f")]
        time = [_number(seconds), _number(1000 * seconds / sequences)]
        rows.append([Cell(result.task), *row, *passes, *time, *(_number(budget.get(key), ",") for key in _BUDGET)])
    headings = ["task", *names, "passes a sequence", "passes in all", "seconds", "ms a sequence", *_BUDGET.values()]
    return _without_empty("Evaluation", headings, rows, 1 + len(names))


def training_costs(runs: Sequence[Run]) -> Table:
    """Updates, sampled completions, passes and seconds of every run."""
    rows = []
    for run in runs:
        nfe = run.curves.get("nfe", {})
        passes = sum(nfe.values()) / len(nfe) if nfe else None
        seconds = [run.costs.get(k) for k in ("seconds_rollout", "seconds_update")]
        budget = [_number(run.costs.get(key), ",") for key in _BUDGET]
        rows.append([*_run_names(run), *budget, _number(passes), *map(_number, seconds)])
    seconds_headings = ["seconds in rollouts", "seconds in updates"]
    headings = ["run", "objective", "decoder", *_BUDGET.values(), "passes a completion", *seconds_headings]
    return _without_empty("Training", headings, rows, 3)


def _without_empty(caption: str, headings: list[str], rows: list[list[Cell]], left: int) -> Table:
    """A table without the columns of numbers in which no row has one."""
    kept = [i for i in range(len(headings)) if i < left or any(row[i].value is not None for row in rows)]
    return Table(caption, [headings[i] for i in kept], [[row[i] for i in kept] for row in rows], left)
