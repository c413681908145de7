"""Reward functions in TRL's signature, called strictly: whatever a faulty one does ends in one sentence."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.spec import UserError
from unmask.tasks.base import Problem, Reward, Task

Row = dict[str, Any]
RELEASED = "released"
"""Stands in ``reward`` for the released trainer's own reward functions of the tasks."""


def reward_name(function: Reward) -> str:
    return getattr(function, "__name__", type(function).__name__)


def load_reward(spec: str) -> Reward:
    """The function named ``package.module:function``; modules of the working folder are found too."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise UserError(f"reward {spec!r} names no function: write package.module:function, or released")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001  (a user's module may raise anything)
        raise UserError(f"reward {spec!r} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UserError(f"reward {spec!r} is not a function but {type(found).__name__}")
    return found


def solved(
    prompts: list[str], completions: list[str], problem: list[Problem], task: list[Task], **_: Any
) -> list[float | None]:
    """1 where the task's grader finds everything right, else 0."""
    return [float(t.grade(p, c).solved) for t, p, c in zip(task, problem, completions, strict=True)]


def reward_functions(specs: Sequence[str], tasks: Sequence[Task]) -> list[tuple[Reward, float]]:
    """The reward functions that a run names, with their weights; the tasks' own where it names none.

    Raises:
        UserError: for a function that cannot be imported, and for ``released`` with a task that has no released reward.
    """
    if not specs:
        return task_rewards(tasks)
    found = [task_rewards(tasks, released=True) if s == RELEASED else [(load_reward(s), 1.0)] for s in specs]
    return [pair for pairs in found for pair in pairs]


def task_rewards(tasks: Sequence[Task], released: bool = False) -> list[tuple[Reward, float]]:
    """The reward functions of tasks (the released ones instead) with their weights; each returns None for rows of other tasks.

    Raises:
        UserError: where a task has no released reward.
    """

    def only(task: Task, function: Reward) -> Reward:
        def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
            mine = [i for i, t in enumerate(columns["task"]) if t == task]
            values: list[float | None] = [None] * len(prompts)
            if mine:
                part = {k: [v[i] for i in mine] for k, v in columns.items()}
                found = function([prompts[i] for i in mine], [completions[i] for i in mine], **part)
                for i, value in zip(mine, found, strict=True):
                    values[i] = value
            return values

        return reward

    pairs = []
    for task in dict.fromkeys(tasks):
        for name, (function, weight) in (task.released_rewards() if released else task.rewards()).items():
            wrapped = only(task, function)
            wrapped.__name__ = name  # type: ignore[attr-defined]
            pairs.append((wrapped, weight))
    return pairs


def check_weights(weights: Sequence[float] | None, names: Sequence[str]) -> None:
    """Raises UserError where there are weights, but not one for each reward function."""
    if weights is not None and len(weights) != len(names):
        raise UserError(f"{len(weights)} reward_weights for the reward functions {', '.join(names)}: give one each")


def score(functions: Sequence[Reward], rows: list[Row], completions: list[str]) -> Tensor:
    """Every function's reward for every completion.

    Args:
        rows: one a completion; ``prompt`` and any further columns, which the functions get as lists by name.

    Returns:
        (B, functions) float32; NaN where a function returned None (it does not judge this row).

    Raises:
        UserError: where a function raises, returns the wrong number of values or something that is no finite number, or
            where every function returned None for a row.
    """
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    prompts = [row["prompt"] for row in rows]
    table = torch.full((len(rows), len(functions)), torch.nan)
    for j, function in enumerate(functions):
        table[:, j] = torch.tensor(_call(function, prompts, completions, columns))
    silent = table.isnan().all(1).nonzero()
    if len(silent):
        names = ", ".join(map(reward_name, functions))
        raise UserError(
            f"every reward function ({names}) returned None for the prompt {prompts[int(silent[0])][:60]!r}: "
            "one of them must judge it"
        )
    return table


def _call(
    function: Callable[..., Any], prompts: list[str], completions: list[str], columns: dict[str, Any]
) -> list[float]:
    name = reward_name(function)
    try:
        values = list(function(prompts=prompts, completions=completions, **columns))
    except Exception as error:  # a user's function may raise anything
        raise UserError(f"reward function {name} raised {type(error).__name__}: {error}; repair it") from error
    if len(values) != len(completions):
        raise UserError(
            f"reward function {name} returned {len(values)} values for {len(completions)} completions: return one each"
        )
    out = []
    for value, completion in zip(values, completions, strict=True):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if value is not None and not math.isfinite(number):
            raise UserError(
                f"reward function {name} returned {value!r} for the completion {completion[:60]!r}: "
                "return a finite number, or None to leave the row to the other functions"
            )
        out.append(number)
    return out
