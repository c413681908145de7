"""What a task is: seeded problems in disjoint splits, a prompt, one grader for training and evaluation, named rewards."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from unmask.config import Registry
from unmask.errors import TooFewProblems, UserError
from unmask.io.hub import Rows, read_rows

if TYPE_CHECKING:
    from unmask.models.masked_lm import MaskedLM

MAX_CONSECUTIVE_DUPLICATES = 50_000  # draws in a row without a new problem, after which a split counts as exhausted


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

    @classmethod
    def of(cls, solved: bool, answer: str | None) -> Grade:
        """One point for a right answer, none for a wrong one."""
        return cls(solved, float(solved), 1.0, answer)


Judge = Callable[[Problem, str], float]  # what a completion of a problem earns
Reward = Callable[..., "list[float | None]"]  # a reward function in TRL's signature
PROMPTS = {f.stem: f.read_text(encoding="utf-8").rstrip() for f in Path(__file__).with_name("prompts").glob("*.txt")}
"""The texts in ``prompts`` by name, with ``{question}`` where the question goes."""
TASKS: Registry[type[Task]] = Registry("task")
"""Tasks by name. ``@TASKS.register("name")`` adds a subclass of ``Task``."""


@dataclass(frozen=True)
class Task(ABC):
    """A kind of problem. Parameters are the fields; equal parameters and seeds give equal problems.

    A task of one's own has a ``name``, ``draw`` (or ``parse``, for data files) and ``grade``; all else is optional.
    """

    name: ClassVar[str]
    score_name: ClassVar[str] = "accuracy"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")
    prompt_template: ClassVar[str] = "{question}"
    """The user's turn in the style ``paper``."""

    style: Literal["paper", "compact", "sentence"] = "paper"
    """``paper``: the long instruction for large models. ``compact``: the short form that ``tiny`` was trained on. ``sentence``:
    the same in another wording, which ``tiny-three`` was trained on too."""
    extraction: Literal["default", "published"] = "default"
    """How an answer is found in a completion. ``published`` repeats the rules of the released evaluation."""
    data: str | None = None
    """A local source instead of the task's own: a file of test problems; where the task says so, a folder with splits."""

    def problems(self, split: str, limit: int | None, seed: int = 0) -> list[Problem]:
        """The first ``limit`` problems of a split (``None``: all, where it is finite). UserError where there are none."""
        if split not in self.splits:
            raise UserError(f"task {self.name} has no split {split!r}: choose from {', '.join(self.splits)}")
        if limit is not None and limit < 1:
            raise UserError(f"the number of problems is {limit}: choose 1 or more")
        return self.generate(split, limit, seed) if self.data is None else self.read(self.data, split, seed)[:limit]

    def generate(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        """The first ``limit`` different problems of a split that are drawn; TooFewProblems where there are fewer."""
        if limit is None:
            raise UserError(f"task {self.name} generates problems without end: set a limit")
        found: dict[str, Problem] = {}
        misses = 0
        for problem in self._drawn(seed):
            misses += 1
            if problem and self.home_split(problem) == split and (key := self.dedup_key(problem, split)) not in found:
                found[key], misses = problem, 0
            if len(found) == limit:
                return list(found.values())
            if misses == MAX_CONSECUTIVE_DUPLICATES:
                break
        fix = (
            "ask for fewer"
            if found
            else "let draw make more different ones, of which a tenth or more are of each split"
        )
        raise TooFewProblems(f"only {len(found)} different {split} problems of task {self.label} exist: {fix}")

    def _drawn(self, seed: int) -> Iterator[Problem | None]:
        """What ``draw`` yields; whatever a faulty one does is a UserError."""
        try:
            yield from self.draw(seed)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UserError(f"draw of task {self.label} raised {error!r}: repair it") from error

    def draw(self, seed: int) -> Iterator[Problem | None]:
        """Problems of all splits from a seed, usually without end; None for a draw that failed."""
        raise UserError(f"task {self.name} generates no problems: set data=FILE")

    def identity(self, problem: Problem) -> str:
        """What fixes a problem's split."""
        return problem.id

    def home_split(self, problem: Problem) -> str:
        """The split that a problem belongs to: by default 80 % train, 10 % validation, 10 % test."""
        b = bucket(self.identity(problem))
        return "train" if b < 80 else "validation" if b < 90 else "test"

    def dedup_key(self, problem: Problem, split: str) -> str:
        """What two problems that count as one have in common."""
        return self.identity(problem)

    def read(self, path: str, split: str, seed: int) -> list[Problem]:
        """All problems of a split out of ``data``: here a file of test problems."""
        if split != "test":
            raise UserError(f"data={path} holds test problems: split {split!r} is only generated")
        return list(self.parse_rows(read_rows(path)))

    def parse_rows(self, rows: Rows) -> Iterator[Problem]:
        """The problems of a data set's rows. Raises UserError that names the first row that is none."""
        for place, row in rows:
            try:
                yield self.parse(row)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{place} is no problem of task {self.name} ({error!r})") from None

    def parse(self, row: dict[str, Any]) -> Problem:
        """The problem of a row in the task's published form. KeyError, TypeError or ValueError where it is none."""
        raise UserError(f"task {self.name} generates its problems: drop data={self.data}")

    def completion_truth(self, row: dict[str, Any]) -> Problem:
        """The Problem behind a row of a completions file (``question``, ``completion``, ``ground_truth``)."""
        raise UserError(f"task {self.name} cannot grade completions made elsewhere")

    @property
    def prefill(self) -> str:
        """What the assistant's turn starts with: ``<reasoning>`` for large models, as in the paper's evaluation."""
        return "<reasoning>" if self.style == "paper" else ""

    def instruction(self, problem: Problem) -> str:
        """The user's turn."""
        template = self.prompt_template if self.style == "paper" else "{question}"
        return template.replace("{question}", problem.question)

    def prompt(self, lm: MaskedLM, problem: Problem, examples: Sequence[Problem] = ()) -> str:
        """The text that a model continues: the problem in its chat template, behind worked examples, and the prefill."""
        if any(example.response is None for example in examples):
            what = f"task {self.name} has no worked responses in this form"
            raise UserError(f"{what}: leave --shots out, or try style=compact")
        turns = [(self.instruction(example), f"{self.prefill}{example.response}") for example in examples]
        return lm.chat(self.instruction(problem), self.prefill, turns)

    @abstractmethod
    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade a completion (the text after the prefill, up to its first end token). Never raises on model text."""

    def reward(self, problem: Problem, completion: str) -> float:
        """What training pays for a completion: here the share of the possible points."""
        grade = self.grade(problem, completion)
        return grade.points / grade.possible

    def rewards(self) -> dict[str, tuple[Judge, float]]:
        """What training rewards, by name with weights."""
        return {self.name: (self.reward, 1.0)}

    def released_rewards(self) -> dict[str, tuple[Judge, float]]:
        """The rewards of the released trainer as its code runs. UserError where it has none."""
        fix = "set reward_funcs to other functions than 'released', or choose other tasks"
        raise UserError(f"task {self.name} has no released reward: {fix}")

    @property
    def label(self) -> str:
        """What figures of the task are called in a run of several."""
        return self.name

    def config(self) -> dict[str, Any]:
        """Name and all parameters, for a record."""
        return {"name": self.name, **asdict(self)}


def grade_completion(task: Task, problem: Problem, completion: str) -> Grade:
    """``task.grade``. Raises UserError, which names the problem, for whatever a faulty one does."""
    try:
        found = task.grade(problem, completion)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"grade of task {task.label} raised {error!r} on problem {problem.id!r}: repair it") from error
    if not isinstance(found, Grade):
        raise UserError(f"grade of task {task.label} returned {found!r} on problem {problem.id!r}: return a Grade")
    return found


def bucket(key: str, buckets: int = 100) -> int:
    """A stable hash of a problem's identity to 0 … buckets-1."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % buckets


def stream_seed(seed: int) -> int:
    """reasoning-gym draws problem i from ``seed + i``, so neighboring seeds would give nearly the same problems."""
    return seed << 40


def draw_metadata(dataset: str, seed: int, **options: Any) -> Iterator[dict[str, Any] | None]:
    """What a reasoning-gym data set says of its problems, one by one without end; None where it found no problem."""
    import reasoning_gym  # slow: only where problems are made

    source = reasoning_gym.create_dataset(dataset, size=2**31, seed=stream_seed(seed), **options)
    for index in count():
        try:
            yield source[index]["metadata"]
        except ValueError:  # no target in range, e.g.
            yield None
