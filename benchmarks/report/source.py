"""A folder as a report shows it, and what its readers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.study.lines import FIX
from unmask.errors import UserError
from unmask.results.figures import Values
from unmask.results.tables import Table, plain


@dataclass
class Source:
    """A folder as a report shows it.

    Attributes:
        what: what it is. facts: title -> value for JSON. tables: its main tables.
        cells: a row a task and decoder: label, the numbers of a summary, ``lengths`` (tokens before the first end token, one a
            problem and seed) and ``curves`` (name -> array; NaN: nothing there).
        runs: a row a training: label, name, settings, costs and ``metrics``, a frame by update.
        differences: rows of a study's summary with their names. compared: their tables. note: what they say.
    """

    name: str
    what: str
    facts: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    cells: list[Values] = field(default_factory=list)
    runs: list[Values] = field(default_factory=list)
    differences: list[tuple[Values, str]] = field(default_factory=list)
    compared: list[Table] = field(default_factory=list)
    note: str = ""


def by_update(entries: Sequence[Values], path: Path) -> pd.DataFrame:
    """The metrics of a run by update; what is not finite, as a diverging run logs it, is absent."""
    metrics = pd.DataFrame(entries).replace([np.inf, -np.inf], np.nan).groupby("step").last().dropna(axis=1, how="all")
    if not {"reward", "eval_reward"} & set(metrics):
        raise UserError(f"{path} holds no rewards among the metrics: {FIX}")
    return metrics


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
