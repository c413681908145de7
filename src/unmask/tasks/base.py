"""What a task is: seeded problems in disjoint splits, a prompt, one grader for training and evaluation, named rewards."""

from __future__ import annotations

import csv
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from unmask.errors import TooFewProblems, UserError

Split = Literal["train", "validation", "test", "heldout"]
Reward = Callable[..., "list[float | None]"]
MAX_CONSECUTIVE_DUPLICATES = 50_000
"""After so many draws in a row without a new problem a split counts as exhausted."""


@dataclass(frozen=True)
class Problem:
    """One problem. ``truth`` holds what the grader needs (JSON values); ``response`` is a worked solution, if any."""

    id: str
    question: str
    truth: dict[str, Any]
    response: str | None = None


@dataclass(frozen=True)
class Grade:
    """The result for one completion: ``points`` out of ``possible`` (pooled over problems) and whether all is right."""

    solved: bool
    points: float
    possible: float
    answer: str | None


@dataclass(frozen=True)
class Task(ABC):
    """A kind of problem. Parameters are the fields; equal parameters and seeds give equal problems."""

    name: ClassVar[str]
    score_name: ClassVar[str] = "accuracy"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    style: Literal["paper", "compact"] = "paper"
    """``paper``: the long instruction for large models. ``compact``: the short form that ``tiny`` was trained on."""
    extraction: Literal["default", "published"] = "default"
    """How an answer is found in a completion. ``published`` repeats the rules of the released evaluation."""
    data: str | None = None
    """A local source instead of the task's own: a file of test problems; where the task says so, a folder with splits."""

    def problems(self, split: str, limit: int | None, seed: int = 0) -> list[Problem]:
        """The first ``limit`` problems of a split (``None``: all, where the split is finite).

        Raises:
            UserError: for an unknown split, a limit below 1, or an empty or unreadable data file.
        """
        if split not in self.splits:
            raise UserError(f"task {self.name} has no split {split!r}: choose from {', '.join(self.splits)}")
        if limit is not None and limit < 1:
            raise UserError(f"the number of problems is {limit}: give 1 or more")
        if self.data is None:
            return self.generate(split, limit, seed)
        found = self.read(self.data, split, seed)
        if not found:
            raise UserError(f"the data file {self.data} holds no problems")
        return found if limit is None else found[:limit]

    def read(self, path: str, split: str, seed: int) -> list[Problem]:
        """All problems of a split out of ``data``: here a file of test problems."""
        if split != "test":
            raise UserError(f"data={path} holds test problems: split {split!r} is only generated")
        try:
            return list(self.load(path))
        except csv.Error as error:
            raise UserError(f"cannot read the data file {path}: {error}") from None

    @property
    def label(self) -> str:
        """What figures of the task are called in a run of several."""
        return self.name

    @property
    def prefill(self) -> str:
        """What the assistant's turn starts with: ``<reasoning>`` for large models, as in the paper's evaluation."""
        return "<reasoning>" if self.style == "paper" else ""

    @abstractmethod
    def generate(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        """Problems made from a seed. Splits are disjoint whatever the seeds."""

    @abstractmethod
    def load(self, path: str) -> Iterator[Problem]:
        """Problems from a file in the task's published format."""

    @abstractmethod
    def instruction(self, problem: Problem) -> str:
        """The user's turn."""

    @abstractmethod
    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade a completion (the text after the prefill, up to its first end token). Never raises on model text."""

    @abstractmethod
    def rewards(self) -> dict[str, tuple[Reward, float]]:
        """Reward functions by name with their weights; TRL's signature, the column ``problem`` holds Problems."""

    def released_rewards(self) -> dict[str, tuple[Reward, float]]:
        """The reward functions of the released trainer as they run, by name with their weights. UserError where it has none."""
        raise UserError(
            f"task {self.name} has no released reward: set reward_funcs to other functions than 'released', or choose "
            "other tasks"
        )

    def completion_truth(self, row: dict[str, Any]) -> Problem:
        """The Problem behind a row of a completions file (``question``, ``completion``, ``ground_truth``)."""
        raise UserError(f"task {self.name} cannot grade completions made elsewhere")

    def config(self) -> dict[str, Any]:
        """Name and all parameters, for a record."""
        return {"name": self.name, **asdict(self)}


def take_unique(drawn: Iterable[tuple[str, Problem] | None], limit: int, what: str) -> list[Problem]:
    """The first ``limit`` different ones of endlessly drawn problems.

    Args:
        drawn: what tells a problem from others, and the problem; None for a draw without one. what: "test problems of ...".

    Raises:
        TooFewProblems: where ENOUGH_MISSES draws in a row brought nothing new.
    """
    found: dict[str, Problem] = {}
    misses = 0
    for draw in drawn:
        if draw is None or draw[0] in found:
            misses += 1
        else:
            found[draw[0]], misses = draw[1], 0
        if len(found) == limit:
            break
        if misses == MAX_CONSECUTIVE_DUPLICATES:
            raise TooFewProblems(f"only {len(found)} different {what}")
    return list(found.values())


def bucket(key: str, buckets: int = 100) -> int:
    """A stable hash of a problem's identity to 0 … buckets-1."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % buckets


def stream_seed(seed: int) -> int:
    """reasoning-gym draws problem i from ``seed + i``, so neighbouring seeds would give nearly the same problems."""
    return seed << 40


def split_of(key: str) -> str:
    """Which split a problem belongs to: 80 % train, 10 % validation, 10 % test, fixed by its identity alone."""
    b = bucket(key)
    return "train" if b < 80 else "validation" if b < 90 else "test"
