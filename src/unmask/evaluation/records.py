"""Records of an evaluation, a JSON line a problem: what they come to, and what their trajectories show over the steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unmask.io.files import read_lines
from unmask.io.schema import RECORD
from unmask.io.store import Record
from unmask.results.statistics import paired_difference, pooled_bootstrap, wilson

if TYPE_CHECKING:
    from unmask.decoding.trajectory import Trajectory
    from unmask.tasks import Problem

FIX = "remove it, and its problems are decoded again"
TIME_BINS, POSITION_BINS = 16, 32


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
    total = {key: sum(r[key] for r in records) for key in ("solved", "nfe", "committed", "length", "seconds")}
    points, possible = ([r[key] for r in records] for key in ("points", "possible"))
    return {
        "problems": n,
        "solved": total["solved"] / n,
        "solved_interval": list(wilson(total["solved"], n)),
        "score": sum(points) / sum(possible),
        "score_interval": list(pooled_bootstrap(points, possible)),
        "nfe": total["nfe"] / n,
        "tokens_per_forward": total["committed"] / n / (total["nfe"] / n),
        "length": total["length"] / n,
        "seconds": total["seconds"],
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


# ---- trajectories ----------------------------------------------------------------------------------------------------


def kept_trajectories(trajectory: Trajectory) -> list[dict[str, list[Any]]]:
    """What a record keeps of each row, (L,) each: ``tokens``, ``steps`` (-1: never committed), ``logprobs`` (nats)."""
    logprobs = [[round(v, 5) for v in row] for row in trajectory.logprob.tolist()]
    rows = zip(trajectory.tokens.tolist(), trajectory.step.tolist(), logprobs, strict=True)
    return [{"tokens": tokens, "steps": steps, "logprobs": logprob} for tokens, steps, logprob in rows]


def curves(records: Sequence[Record], end_ids: Collection[int], steps: int | None) -> dict[str, Any]:
    """Curves of one cell from records with trajectories, as lists with one entry a step; None where nothing was committed.

    Args:
        end_ids: the tokens that end a text. steps: of the decoder's plan; None where rows take as many as they need.

    Returns:
        ``commits``: mean number of tokens committed, over all rows; ``eos_share``: share of end tokens among them;
        ``end_confidence``, ``other_confidence``: mean probability of the committed end tokens and of the others;
        ``order``, 16 x 32: the share of a position's commits that fall into a part of the decode. Step s of S (the plan's, or
        the row's own) lies in part 16 s / S, position i of L in column 32 i / L. A column sums to 1, or holds None.
    """
    tokens, at, logprobs = (np.array([r[key] for r in records]) for key in ("tokens", "steps", "logprobs"))
    length, done, ends, probs = tokens.shape[1], at >= 0, np.isin(tokens, list(end_ids)), np.exp(logprobs)

    def by_step(chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.bincount(at[chosen], weights=weights[chosen], minlength=int(at.max()) + 1)

    def share(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
        return [round(float(p / w), 6) if w else None for p, w in zip(part, whole, strict=True)]

    commits, end_commits = by_step(done, done), by_step(done & ends, done)
    order = np.zeros((TIME_BINS, POSITION_BINS))
    column = np.broadcast_to(np.arange(length) * POSITION_BINS // length, at.shape)
    taken = at.max(1, keepdims=True) + 1 if steps is None else np.full((len(at), 1), steps)
    np.add.at(order, ((at * TIME_BINS // taken)[done], column[done]), 1)
    return {
        "commits": [round(float(c) / len(records), 6) for c in commits],
        "eos_share": share(end_commits, commits),
        "end_confidence": share(by_step(done & ends, probs), end_commits),
        "other_confidence": share(by_step(done & ~ends, probs), commits - end_commits),
        "order": [share(row, order.sum(0)) for row in order],
    }
