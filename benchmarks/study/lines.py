"""The lines of a study: cells.jsonl, one a finished cell with an entry a problem, and runs.jsonl, one a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.study import Values
from unmask.errors import UserError
from unmask.io.files import atomic_write, each_line
from unmask.io.schema import AMOUNT, COUNT, CURVES, METRICS, POSITIVE, STEPS, Number, check_same_length

_TRAINED = {"updates": COUNT, "completions": COUNT, "training_passes": COUNT}
_CELL = {
    **dict.fromkeys(("key", "score_name", "problems", "solved"), str),
    **{"length": [COUNT], "committed": [COUNT], "points": [AMOUNT], "possible": [Number(1e-6)], "nfe": [POSITIVE]},
    **{"seconds": AMOUNT, "curves?": CURVES, "environment": dict},
    "cell": {"task": str, "decoder": str},
    "budget": {"nfe": POSITIVE, **{f"{key}?": COUNT for key in _TRAINED}},
    "model": {"name": str, "weights": str},
}
_RUN = {
    **{"key": str, "train": dict, "budget": _TRAINED, "metrics": [METRICS]},
    "seconds": {"rollout": AMOUNT, "update": AMOUNT},
}
FIX = "choose a complete folder"


def _check_cell(cell: Values) -> Values:
    """The same. Raises ValueError where its lists have not an entry a problem, or its curves not an entry a step."""
    if not cell["solved"] or set(cell["solved"]) - {"0", "1"}:
        raise ValueError("solved is not a 0 or 1 for each problem")
    check_same_length(cell, "solved", "points", "possible", "nfe", "length", "committed")
    check_same_length(cell.get("curves", {}), *STEPS)
    return cell


def cell_lines(path: Path, fix: str = FIX) -> list[Values]:
    """The lines of a cells.jsonl. Raises UserError, with ``fix`` as its end, where one is no cell."""
    return list(each_line(path, _CELL, fix, _check_cell))


def run_lines(path: Path, fix: str = FIX) -> list[Values]:
    """The lines of a runs.jsonl. Raises UserError, with ``fix`` as its end, where one is no training."""
    return list(each_line(path, _RUN, fix))


def read_cells(folder: Path) -> list[Values]:
    """The lines of a study's cells.jsonl. Raises UserError where there are none, or they are not those of one study."""
    cells = cell_lines(folder / "cells.jsonl")
    if not cells:
        raise UserError(f"{folder} holds no finished cell of a study (cells.jsonl): let it run first")
    if len({cell["key"] for cell in cells}) < len(cells):
        raise UserError(f"{folder / 'cells.jsonl'} holds a cell twice: {FIX}")
    if any(set(cell["cell"]) != set(cells[0]["cell"]) for cell in cells):
        raise UserError(f"{folder / 'cells.jsonl'} holds cells with different axes: let the study write it again")
    return cells


class Lines:
    """A study's cells.jsonl or runs.jsonl: always whole, and in the order of the study, whatever is finished first."""

    def __init__(
        self, path: Path, name: str, labels: Mapping[str, Values], read: Callable[[Path, str], list[Values]]
    ) -> None:
        """
        Args:
            name: under which a line has its labels. labels: of every line that the study names, by key, in its order.

        Raises:
            UserError: where the file is damaged, or holds lines that the study does not name.
        """
        self.path, self.name, self.labels = path, name, labels
        self.lines = {line["key"]: line for line in read(path, "remove it, and what it held is run again")}
        if unknown := len(self.lines.keys() - labels.keys()):
            raise UserError(
                f"{path} holds {unknown} lines that this study does not name: choose another output, or name them again"
            )

    def add(self, key: str, line: Values) -> None:
        self.lines[key] = {"key": key, self.name: self.labels[key], **line}
        self.write()

    def write(self) -> None:
        """Write the file, every line with the labels that it has in the study as it is now."""
        self.lines = {key: {**self.lines[key], self.name: own} for key, own in self.labels.items() if key in self.lines}
        dumped = (json.dumps(e, ensure_ascii=False, separators=(",", ":")) + "\n" for e in self.lines.values())
        with atomic_write(self.path) as partial:
            partial.write_text("".join(dumped), encoding="utf-8")
