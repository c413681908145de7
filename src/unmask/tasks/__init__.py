"""Tasks by name. ``make_task("countdown:numbers=4")`` is how every command finds one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.config import build, split_spec
from unmask.errors import unknown
from unmask.tasks.base import Grade, Problem, Task
from unmask.tasks.countdown import Countdown
from unmask.tasks.math.gsm8k import GSM8K
from unmask.tasks.math.math500 import MATH500
from unmask.tasks.reasoning_gym import ReasoningGym
from unmask.tasks.sudoku import Sudoku

__all__ = ["TASKS", "Grade", "Problem", "Task", "make_task"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Countdown, Sudoku, GSM8K, MATH500)}


def make_task(spec: str, defaults: Mapping[str, Mapping[str, Any]]) -> Task:
    """A task from ``name:key=value,…``.

    Args:
        spec: e.g. ``"sudoku"`` or ``"countdown:numbers=4,style=compact"``.
        defaults: parameters by task name that a checkpoint was trained for; the spec overrides them.

    Raises:
        UserError: for an unknown task or parameter, or a value out of range.
    """
    head, _, dataset = spec.partition(":")
    if head.strip() == "reasoning_gym":
        dataset, _, options = dataset.partition(",")
        return ReasoningGym(dataset=dataset.strip(), options=tuple(split_spec(f"{dataset}:{options}")[1].items()))
    name, parameters = split_spec(spec)
    if name not in TASKS:
        raise unknown("task", name, [*TASKS, "reasoning_gym:NAME"])
    return build(TASKS[name], {**defaults.get(name, {}), **parameters}, f"task {name!r}")
