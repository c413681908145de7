"""Reward functions in TRL's signature, called strictly: whatever a faulty one does ends in one sentence."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unmask.config import Registry
from unmask.errors import UserError
from unmask.tasks.base import Judge, Problem, Reward, Task

Row = dict[str, Any]
MASK = "\N{WHITE SQUARE}"
"""A mask in the drafts that reward functions get."""
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


@REWARDS.register("progress")
def progress(
    prompts: list[str],
    completions: list[str],
    problem: list[Problem],
    task: list[Task],
    drafts: list[list[str]],
    **_: Any,
) -> list[list[float]]:
    """What each step adds to the share of the points that the task's grader finds in the draft, masks read as 0."""

    def share(task: Task, problem: Problem, draft: str) -> float:
        grade = task.grade(problem, draft.replace(MASK, "0"))
        return grade.points / grade.possible

    every = [[share(t, p, d) for d in texts] for t, p, texts in zip(task, problem, drafts, strict=True)]
    return [[after - before for before, after in pairwise([0.0, *shares])] for shares in every]


@dataclass(frozen=True)
class Rewards:
    """What the reward functions paid.

    Attributes:
        table: (B, functions) float32; NaN where one does not judge a row, and the sum of what it pays for steps.
        steps: of functions that pay for steps, by their number: (B, S) float32, NaN behind a row's last step.
    """

    table: Tensor
    steps: dict[int, Tensor]

    def total(self, weights: Sequence[float]) -> Tensor:
        """The weighted sum of every function's rewards, (B,); those that do not judge a row are left out."""
        return (self.table * torch.tensor(weights)).nansum(1)

    def split(self, weights: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        """The weighted sums of what is paid for whole completions, (B,), and for steps, (B, S) (None: nothing is)."""
        whole = [w * (number not in self.steps) for number, w in enumerate(weights)]
        parts = [weights[number] * paid for number, paid in self.steps.items()]
        return self.total(whole), sum(parts[1:], parts[0]) if parts else None

    def take(self, rows: Tensor) -> Rewards:
        return Rewards(self.table[rows], {number: paid[rows] for number, paid in self.steps.items()})

    @staticmethod
    def cat(parts: Sequence[Rewards]) -> Rewards:
        """Of the same functions, one below the other."""
        steps = {n: _padded([row for part in parts for row in part.steps[n]]) for n in parts[0].steps}
        return Rewards(torch.cat([part.table for part in parts]), steps)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=math.nan)


def score(
    functions: Mapping[str, Reward],
    rows: list[Row],
    completions: list[str],
    drafts: Callable[[], list[list[str]]] | None = None,
) -> Rewards:
    """Every function's reward for every completion.

    Args:
        rows: one a completion; ``prompt`` and any further columns, which the functions get as lists by name.
        drafts: makes each completion's texts after every step, for functions that name ``drafts``; masks are ``MASK`` there.

    Raises:
        UserError: where a function raises, returns anything but a finite number, None, or one number a step for a completion,
            or none judges a row.
    """
    columns = {f"{key}s" if key == "prompt" else key: [row[key] for row in rows] for key in rows[0]}
    texts: dict[str, Any] = {"completions": completions}
    if wanting := [name for name, function in functions.items() if "drafts" in _parameters(function)]:
        if drafts is None:
            raise UserError(f"reward function {wanting[0]} reads drafts, and here are completions alone: use another")
        texts["drafts"] = drafts()
    paid = [_call(name, f, texts, columns) for name, f in functions.items()]
    steps = {n: _padded(values) for n, values in enumerate(paid) if values[0].dim()}
    table = torch.stack([torch.stack([v.sum() for v in values]) for values in paid], 1)
    silent = table.isnan().all(1).nonzero()
    if len(silent):
        raise UserError(
            f"every reward function ({', '.join(functions)}) returned None for the prompt "
            f"{rows[int(silent[0])]['prompt'][:60]!r}: one of them must judge it"
        )
    return Rewards(table, steps)


def _parameters(function: Reward) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin
        return ()


def _call(name: str, function: Reward, texts: dict[str, Any], columns: dict[str, Any]) -> list[Tensor]:
    """What it pays for each completion: a number (NaN for None), or numbers of its steps, as tensors."""
    completions = texts["completions"]
    drafts = texts.get("drafts") if "drafts" in _parameters(function) else None
    try:
        found = list(function(completions=completions, **({} if drafts is None else {"drafts": drafts}), **columns))
        values = [_number(v) for v in found]
    except Exception as error:  # a user's function may raise anything
        raise UserError(f"reward function {name} raised {type(error).__name__}: {error}; repair it") from error
    if len(values) != len(completions):
        raise UserError(
            f"reward function {name} returned {len(values)} values for {len(completions)} completions: return one each"
        )
    by_step = any(v.dim() for v in values)
    for number, (value, completion) in enumerate(zip(values, completions, strict=True)):
        returned = f"reward function {name} returned {found[number]!r:.60} for the completion {completion[:60]!r}"
        if by_step and drafts is None:
            raise UserError(f"{returned}: name drafts among its arguments to pay for steps")
        if by_step and found[number] is None:  # nothing for these steps
            values[number] = torch.zeros(len(drafts[number]))  # type: ignore[index]
        elif by_step and value.shape != (len(drafts[number]),):  # type: ignore[index]
            raise UserError(f"{returned}: return {len(drafts[number])} values, one a step")  # type: ignore[index]
        elif found[number] is not None and not value.isfinite().all():
            raise UserError(f"{returned}: return a finite number, or None to leave the row to the other functions")
    return values


def _number(value: Any) -> Tensor:
    """A reward as a tensor: of no dimension, or of one where it is a list."""
    if isinstance(value, str):
        value = float(value)
    return torch.as_tensor(math.nan if value is None else value, dtype=torch.float32)
