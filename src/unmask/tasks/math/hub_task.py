"""What GSM8K and MATH500 share: problems from the hub or a local copy, prompts, splits."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from unmask.errors import TooFewProblems, UserError
from unmask.io.files import read_text
from unmask.io.hub import load_split
from unmask.tasks import answers
from unmask.tasks.base import PROMPTS, Judge, Problem, Task, bucket

TEMPLATES = ("boxed", "tags")


@dataclass(frozen=True)
class HubMathTask(Task):
    """A task of published word problems. ``data``: a file of test problems, or a folder with ``train`` and ``test`` files."""

    hub_train: ClassVar[tuple[str, str | None]]
    """Data set and configuration on the hub behind the published split."""
    hub_test: ClassVar[tuple[str, str | None]]

    template: str = "boxed"
    """``boxed``: solve step by step, the answer in a box inside answer tags. ``tags``: only the form, the answer alone in
    the tags. Otherwise the path of a text file with ``{question}`` in it."""

    def __post_init__(self) -> None:
        if self.style != "paper":
            raise UserError(f"task {self.name} has no style {self.style!r}: drop that parameter")
        if "{question}" not in self.template_text():
            raise UserError(f"the template {self.template} lacks {{question}}: put it where the question goes")

    def template_text(self) -> str:
        """The prompt with ``{question}`` where the question goes."""
        if self.template in TEMPLATES:
            return PROMPTS[self.template]
        return read_text(self.template, f"the template ({', '.join(TEMPLATES)} or a file)")

    def instruction(self, problem: Problem) -> str:
        return self.template_text().replace("{question}", problem.question)

    def config(self) -> dict[str, Any]:
        return super().config() | ({} if self.template in TEMPLATES else {"template_text": self.template_text()})

    def make_problem(self, question: str, answer: str, steps: str | None = None) -> Problem:
        """A problem with its response (where there are steps) in the form that the template asks for, behind the prefill."""
        if not isinstance(question, str) or not question.strip():
            raise ValueError("no question")
        digest = hashlib.sha256(question.encode()).hexdigest()[:16]
        written = f"\\boxed{{{answer}}}" if "\\boxed" in self.template_text() else answer
        response = f"\n{steps.strip()}\n</reasoning>\n<answer>\n{written}\n</answer>" if steps else None
        return Problem(f"{self.name} {digest}", question, {"answer": answer}, response)

    def generate(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        """Problems of the hub's data set; ``train`` and ``validation`` are parts of its training split."""
        found = self._read_split(None, split, seed)
        if limit is not None and limit > len(found) and split != "test":
            raise TooFewProblems(f"task {self.name} has {len(found)} {split} problems, not {limit}: ask for fewer")
        return found[:limit]

    def read(self, path: str, split: str, seed: int) -> list[Problem]:
        """Problems of a file (all are test problems) or of a folder: its ``train.*`` and ``test.*``, or a copy of the hub's."""
        return self._read_split(path, split, seed) if os.path.isdir(path) else super().read(path, split, seed)

    def _read_split(self, folder: str | None, split: str, seed: int) -> list[Problem]:
        """A tenth of the published training problems, fixed by the question alone, is for validation. Test stays as it is."""
        (name, configuration), part = (self.hub_test, "test") if split == "test" else (self.hub_train, "train")
        local = "a folder with train and test files, or a copy of the hub's"
        instead = local if folder else f"a local file or folder as {self.name}:data=PATH"
        problems = self.parse_rows(load_split(folder or name, part, configuration, instead))
        if split == "test":
            return list(problems)
        different = {p.id: p for p in problems}.values()
        mine = [p for p in different if (bucket(p.question) < 10) == (split == "validation")]
        if split == "validation":
            return sorted(mine, key=lambda p: p.id)
        random.Random(seed).shuffle(mine)
        return mine

    def full_text(self, completion: str) -> str:
        """Prefill and completion up to its end token: what a format is judged by, as the prompt ends inside the answer."""
        return self.prefill + answers.cut_at_end(completion)

    def of_text(self, rate: Callable[[str], float]) -> Judge:
        """The judge that rates the full text."""
        return lambda _, completion: rate(self.full_text(completion))
