"""Reward functions in TRL's signature, called strictly: whatever a faulty one does ends in one sentence."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.tasks.base import Judge, Problem, Reward, Task

Row = dict[str, Any]
RELEASED = "released"
"""Stands in ``reward`` for the released trainer's own reward functions of the tasks."""


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


def load_reward(spec: str) -> Reward:
    """The function named ``package.module:function``; modules of the working folder are found too."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise UserError(f"reward {spec!r} names no function: write package.module:function, or released")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001  (a user's module may raise anything)
        raise UserError(f"reward {spec!r} cannot be imported: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UserError(f"reward {spec!r} is not a function but {type(found).__name__}")
    if isinstance(found, type):
        raise UserError(f"reward {spec!r} is a class: name an object of it, or a function")
    return _named(found, name)


def load_rewards(specs: Sequence[str]) -> list[Reward]:
    """``load_reward`` of each; functions of one name in several modules are called ``package.module.function``."""
    names = [spec.partition(":")[2] for spec in dict.fromkeys(specs)]
    return [
        load_reward(spec)
        if names.count(spec.partition(":")[2]) < 2
        else _named(load_reward(spec), spec.replace(":", "."))
        for spec in specs
    ]


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
    own = iter(load_rewards([s for s in specs if s != RELEASED]))
    found = [task_rewards(tasks, released=True) if s == RELEASED else [(next(own), 1.0)] for s in specs]
    return [pair for pairs in found for pair in pairs]


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
