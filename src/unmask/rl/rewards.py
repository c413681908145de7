"""Reward functions in TRL's signature, called strictly: whatever a faulty one does ends in one sentence."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.config import Registry
from unmask.errors import UserError
from unmask.tasks.base import Judge, Problem, Reward, Task

Row = dict[str, Any]
REWARDS: Registry[Reward | None] = Registry("reward")
REWARDS["released"] = None  # means the released trainer's own reward functions of the tasks
REWARDS["task"] = None  # means the tasks' own


@REWARDS.register("solved")
def solved(
    prompts: list[str], completions: list[str], problem: list[Problem], task: list[Task], **_: Any
) -> list[float | None]:
    """1 where the task's grader finds everything right, else 0."""
    return [float(t.grade(p, c).solved) for t, p, c in zip(task, problem, completions, strict=True)]


def reward_functions(rewards: Sequence[str | Reward], tasks: Sequence[Task]) -> dict[str, tuple[Reward, float]]:
    """The reward functions of a run with their weights, by the names of their metrics; the tasks' own where there are none.

    Args:
        rewards: functions, or their names: registered ones, ``package.module:name``, ``task`` or ``released``. Where several
            have one name, the second is ``NAME_2``, and so on.
    """
    found = [] if rewards else _task_rewards(tasks, released=False)
    for spec in rewards:
        function = REWARDS.resolve(spec) if isinstance(spec, str) else spec
        if function is None:
            found += _task_rewards(tasks, released=spec == "released")
        elif isinstance(function, type) or not callable(function):
            raise UserError(
                f"reward {spec!r} is {function!r:.60}: name a function, or an object that is called like one"
            )
        else:
            found.append((spec.rpartition(":")[2] if isinstance(spec, str) else _name(function), function, 1.0))
    named: dict[str, tuple[Reward, float]] = {}
    for name, function, weight in found:
        names = (name, *(f"{name}_{k}" for k in range(2, len(found) + 2)))
        free = next(n for n in names if n not in (*named, "std"))  # reward_std is the rollout's own
        named[free] = (function, weight)
    return named


def _name(function: Reward) -> str:
    """A partial object's name is that of the function in it, any other object's that of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _task_rewards(tasks: Sequence[Task], released: bool) -> list[tuple[str, Reward, float]]:
    """The tasks' own reward functions (or the released ones), each None for rows of other tasks, with names and weights."""

    def only(task: Task, judge: Judge) -> Reward:
        def reward(
            prompts: list[str], completions: list[str], problem: list[Problem], **columns: Any
        ) -> list[float | None]:
            rows = zip(columns["task"], problem, completions, strict=True)
            return [judge(p, completion) if t == task else None for t, p, completion in rows]

        return reward

    different = list(dict.fromkeys(tasks))
    return [
        (name if len(different) == 1 else f"{task.name}_{name}", only(task, judge), weight)
        for task in different
        for name, (judge, weight) in (task.released_rewards() if released else task.rewards()).items()
    ]


def score(functions: Mapping[str, Reward], rows: list[Row], completions: list[str]) -> Tensor:
    """Every function's reward for every completion, (B, functions) float32; NaN where it returned None (it does not judge it).

    Args:
        rows: one a completion; ``prompt`` and any further columns, which the functions get as lists by name.

    Raises:
        UserError: where a function raises, returns anything but a finite number or None a completion, or none judges a row.
    """
    columns = {f"{key}s" if key == "prompt" else key: [row[key] for row in rows] for key in rows[0]}
    table = torch.tensor([_call(*item, completions, columns) for item in functions.items()]).T.contiguous()
    silent = table.isnan().all(1).nonzero()
    if len(silent):
        raise UserError(
            f"every reward function ({', '.join(functions)}) returned None for the prompt "
            f"{rows[int(silent[0])]['prompt'][:60]!r}: one of them must judge it"
        )
    return table


def total(table: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum of every function's rewards, (B, functions) -> (B,); those that do not judge a row are left out."""
    return (table * torch.tensor(weights)).nansum(1)


def _call(name: str, function: Reward, completions: list[str], columns: dict[str, Any]) -> list[float]:
    try:
        values = [None if v is None else float(v) for v in function(completions=completions, **columns)]
    except Exception as error:  # a user's function may raise anything
        raise UserError(f"reward function {name} raised {type(error).__name__}: {error}; repair it") from error
    if len(values) != len(completions):
        raise UserError(
            f"reward function {name} returned {len(values)} values for {len(completions)} completions: return one each"
        )
    for value, completion in zip(values, completions, strict=True):
        if value is not None and not abs(value) <= torch.finfo(torch.float32).max:
            raise UserError(
                f"reward function {name} returned {value} for the completion {completion[:60]!r}: return a finite number, or "
                "None to leave the row to the other functions"
            )
    return [math.nan if v is None else v for v in values]
