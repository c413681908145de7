"""Tasks by name. ``make_task("countdown:numbers=4")`` is how every command finds one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.config import build, split_spec
from unmask.errors import UserError
from unmask.tasks import chain_sum, countdown, sudoku  # noqa: F401  (they register themselves)
from unmask.tasks.base import TASKS, Grade, Judge, Problem, Task
from unmask.tasks.math import gsm8k, math500  # noqa: F401
from unmask.tasks.reasoning_gym import ReasoningGym

__all__ = ["TASKS", "Grade", "Judge", "Problem", "Task", "make_task"]


def make_task(spec: str, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> Task:
    """A task from ``"countdown:numbers=4"``, ``"reasoning_gym:leg_counting"``, ``"package.module:Name,key=value"`` or alike.

    ``defaults``: parameters by task name that a checkpoint was trained for; the spec overrides them. Raises UserError for an
    unknown task or parameter, or a value out of range.
    """
    name, parameters = split_spec(spec)
    if name.split(":")[0] == ReasoningGym.name:
        return ReasoningGym(dataset=name.partition(":")[2], options=tuple(parameters.items()))
    task = TASKS.resolve(name)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"task {name!r} is no subclass of unmask.Task: write one, or choose from {', '.join(TASKS)}")
    if not isinstance(getattr(task, "name", None), str):
        raise UserError(f'task {name!r} has no name: write name = "…" into its class')
    return build(task, {**(defaults or {}).get(task.name, {}), **parameters}, f"task {name!r}")
