"""Records of an evaluation: one JSON line a problem, in a file a cell; what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.io.files import read_lines
from unmask.io.schema import RECORD
from unmask.io.store import Record
from unmask.results.statistics import paired_difference, pooled_bootstrap, wilson
from unmask.tasks import Problem

FIX = "remove it, and its problems are decoded again"


def read_records(path: Path) -> list[Record]:
    """A records file by index. Raises UserError where it is damaged."""
    return sorted(read_lines(path, RECORD, FIX), key=lambda r: r["index"])


def check_problem(record: Record, problems: Sequence[Problem]) -> None:
    """Raises ValueError where a record is not of the problem at its index."""
    index, found = record["index"], record["id"]
    if index >= len(problems) or found != problems[index].id:
        raise ValueError(f"index {index} is {found!r:.60}")


def summarize(records: Sequence[Record]) -> dict[str, Any]:
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


def compare_to_best(cells: Sequence[dict[str, Any]], records: Sequence[Sequence[Record]]) -> None:
    """Give the cells of a task with several decoders ``to_best``: solved minus the best decoder's, on the same problems.

    The best solves most (of equals, in the fewest passes) and gets none. Intervals are paired bootstraps, 95 %, as shares.
    """
    for task in {cell["task"] for cell in cells}:
        own = [i for i, cell in enumerate(cells) if cell["task"] == task]
        best = max(own, key=lambda i: (cells[i]["solved"], -cells[i]["nfe"]))
        theirs = [r["solved"] for r in records[best]]
        for i in own:
            if i != best:
                difference, interval = paired_difference([r["solved"] for r in records[i]], theirs, [1.0] * len(theirs))
                found = {"decoder": cells[best]["decoder"], "difference": difference, "interval": list(interval)}
                cells[i]["to_best"] = found
