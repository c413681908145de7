"""Records of an evaluation: one JSON line a problem, in a file a cell, and a shard a process while they are being made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.io.files import read_lines, whole
from unmask.io.schema import RECORD
from unmask.results.statistics import paired_difference, pooled_bootstrap, wilson
from unmask.tasks import Problem

Record = dict[str, Any]
_FIX = "remove it, and its problems are decoded again"


def read_records(path: Path) -> list[Record]:
    """A records file by index. Raises UserError where it is damaged."""
    return sorted(read_lines(path, RECORD, _FIX), key=lambda r: r["index"])


def shard(path: Path, rank: int) -> Path:
    """Where a process writes what belongs into the records file ``path``."""
    return path.with_name(f"{path.name}.rank-{rank}")


def as_lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def merge(path: Path, problems: Sequence[Problem], world: int, schema: Any = RECORD) -> dict[int, Record]:
    """Take all shards, of whatever number of processes, into ``path``; returns its records by index, in order.

    The file is in place, whole and sorted, before a shard goes, and an index counts once: a crash at any moment neither loses
    nor doubles a record. Shards of ranks below ``world`` are looked for by name, since a network file system may list late.

    Raises:
        UserError: where a file is damaged or holds records of other problems; everything then stays as it is.
    """
    shards = {*path.parent.glob(f"{path.name}.rank-*"), *(shard(path, rank) for rank in range(world))}
    parts = sorted(p for p in shards if p.exists())
    records: dict[int, Record] = {}
    for part in (path, *parts):
        found = {r["index"]: r for r in read_lines(part, schema, _FIX)}
        if any(i >= len(problems) or r["id"] != problems[i].id for i, r in found.items()):
            raise UserError(f"{part} holds records of other problems: give another --output")
        records = {**found, **records}
    records = dict(sorted(records.items()))
    if parts:
        with whole(path) as partial:
            partial.write_text(as_lines(list(records.values())), encoding="utf-8")
        for part in parts:
            part.unlink()
    return records


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
