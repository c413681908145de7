"""Reward functions in TRL's signature, called strictly: whatever a faulty one does ends in one sentence."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.config import Registry
from unmask.errors import UserError
from unmask.tasks.base import Judge, Problem, Reward, Task

Row = dict[str, Any]
REWARDS: Registry[Reward | None] = Registry("reward")
REWARDS["released"] = None  # stands for the released trainer's own reward functions of the tasks


@REWARDS.register("solved")
def solved(
    prompts: list[str], completions: list[str], problem: list[Problem], task: list[Task], **_: Any
) -> list[float | None]:
    """1 where the task's grader finds everything right, else 0."""
    return [float(t.grade(p, c).solved) for t, p, c in zip(task, problem, completions, strict=True)]


def reward_name(function: Reward) -> str:
    """What a function is called in messages; a partial object by the function in it, any other object by its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def reward_names(functions: Sequence[Reward]) -> list[str]:
    """A name for each function's metric, ``reward_NAME``; where several share one, the second is ``NAME_2``, and so on."""
    names = ["std"]  # reward_std is the rollout's own
    for function in functions:
        numbered = (f"{reward_name(function)}{end}" for end in ("", *(f"_{k}" for k in range(2, len(functions) + 2))))
        names.append(next(name for name in numbered if name not in names))
    return names[1:]


def _named(function: Reward, name: str) -> Reward:
    """``function``, with ``name`` for its metric."""

    def reward(*arguments: Any, **columns: Any) -> list[float | None]:
        return function(*arguments, **columns)

    reward.__name__ = name
    return reward


def reward_functions(rewards: Sequence[str | Reward], tasks: Sequence[Task]) -> list[tuple[Reward, float]]:
    """The reward functions of a run with their weights; the tasks' own where there are none.

    Args:
        rewards: functions, or their names: registered ones, ``package.module:name``, or ``released``. Functions of one name in
            several modules are called ``package.module.name``.

    Raises:
        UserError: for a function that cannot be imported, and for ``released`` with a task that has no released reward.
    """
    if not rewards:
        return task_rewards(tasks)
    last = {spec: spec.rpartition(":")[2] for spec in rewards if isinstance(spec, str)}
    found: list[tuple[Reward, float]] = []
    for spec in rewards:
        function = REWARDS.resolve(spec) if isinstance(spec, str) else spec
        if function is None:
            found += task_rewards(tasks, released=True)
        elif not callable(function):
            raise UserError(f"reward {spec!r} is not a function but {type(function).__name__}")
        elif isinstance(function, type):
            raise UserError(f"reward {spec!r} is a class: name an object of it, or a function")
        elif isinstance(spec, str):
            alone = list(last.values()).count(last[spec]) == 1
            found.append((_named(function, last[spec] if alone else spec.replace(":", ".")), 1.0))
        else:
            found.append((function, 1.0))
    return found


def task_rewards(tasks: Sequence[Task], released: bool = False) -> list[tuple[Reward, float]]:
    """The reward functions of tasks (the released ones instead) with their weights; each returns None for rows of other tasks.

    Those of several tasks bear their task's name before their own.

    Raises:
        UserError: where a task has no released reward.
    """

    def only(task: Task, judge: Judge) -> Reward:
        def reward(
            prompts: list[str], completions: list[str], problem: list[Problem], **columns: Any
        ) -> list[float | None]:
            rows = zip(columns["task"], problem, completions, strict=True)
            return [judge(p, completion) if t == task else None for t, p, completion in rows]

        return reward

    different = list(dict.fromkeys(tasks))
    return [
        (_named(only(task, judge), name if len(different) == 1 else f"{task.name}_{name}"), weight)
        for task in different
        for name, (judge, weight) in (task.released_rewards() if released else task.rewards()).items()
    ]


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
    columns = {f"{key}s" if key == "prompt" else key: [row[key] for row in rows] for key in rows[0]}
    table = torch.stack([torch.tensor(_call(function, completions, columns)) for function in functions], 1)
    silent = table.isnan().all(1).nonzero()
    if len(silent):
        names = ", ".join(map(reward_name, functions))
        raise UserError(
            f"every reward function ({names}) returned None for the prompt {rows[int(silent[0])]['prompt'][:60]!r}: "
            "one of them must judge it"
        )
    return table


def _call(function: Reward, completions: list[str], columns: dict[str, Any]) -> list[float]:
    name = reward_name(function)
    try:
        values = list(function(completions=completions, **columns))
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
        except Exception:  # noqa: BLE001  (an object's own conversion may raise anything)
            number = math.inf
        if value is not None and not abs(number) <= torch.finfo(torch.float32).max:
            raise UserError(
                f"reward function {name} returned {_shown(value)} for the completion {completion[:60]!r}: "
                "return a finite number, or None to leave the row to the other functions"
            )
        out.append(number)
    return out


def _shown(value: Any) -> str:
    """The beginning of what a value looks like."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  (integers of many digits refuse, and objects may do anything)
        text = f"{type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else f"{text[:60]}…"
