"""Arguments of ``unmask view``, read without torch, so that help and errors appear at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from unmask.errors import UserError, check_at_least, check_seed
from unmask.models.source import ModelSource


@dataclass(kw_only=True)
class ViewArguments(ModelSource):
    """Write one HTML page on which a canvas fills step by step, for one prompt under one to four decoders."""

    prompt: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """The user's turn; or one to four records files (.jsonl) of ``unmask eval``, whose problem is decoded again."""
    model: str = "auto"
    """As elsewhere: a name or a folder. ``auto``: the model that the records were made with; without records ``tiny``."""
    task: str | None = None
    """Instead of a prompt, a problem of this task's test split; its text is graded."""
    index: int = 0
    """Which problem of the task or of the records."""
    decoder: list[str] = field(default_factory=lambda: ["semi-ar", "eoser-ass"])
    """One to four decoder specs or YAML files, side by side."""
    max_new_tokens: int = 128
    """Canvas length in tokens, unless a decoder sets its own."""
    prefill: str = ""
    """Text that the assistant's turn starts with."""
    seed: int = 0
    """With a prompt as in ``unmask generate``, with a task as in ``unmask eval``."""
    early_stop: bool = True
    """A canvas is finished once its text is: all committed up to its first end token."""
    candidates: int = 5
    """How many of the likeliest tokens the page keeps for a cell."""
    output: str = "runs/view.html"
    """The file to write."""

    def check(self) -> bool:
        """Whether records are decoded again. Raises UserError where a value is out of range or two exclude each other."""
        check_at_least(self, 0, "index")
        check_seed(self)
        repeats = any(p.endswith(".jsonl") for p in self.prompt)
        for text in self.prompt:  # os.path.exists takes a text of any length
            if not text.endswith(".jsonl") and (repeats or os.path.exists(text)):
                hint = "use RUN/records/TASK--DECODER.jsonl of unmask eval, or one text"
                raise UserError(f"{text:.99} is no records file: {hint}")
        if not 1 <= self.candidates <= 20:
            raise UserError(f"candidates is {self.candidates}: choose 1 to 20")
        panels, what = (self.prompt, "records files") if repeats else (self.decoder, "decoders")
        if not 1 <= len(panels) <= 4:
            raise UserError(f"{len(panels)} {what}: a page shows one to 4")
        if repeats:
            names, why = "task decoder max_new_tokens prefill seed early_stop", "the records decide that"
        elif self.task is not None:
            names, why = "prompt prefill", "the task decides that"
        elif len(self.prompt) != 1:
            raise UserError(f"{len(self.prompt)} prompts: use one text in quotes, records files (.jsonl) or --task")
        else:
            names, why = "index", "a prompt has no others"
        for name in names.split():
            if getattr(self, name) != getattr(ViewArguments(), name):
                raise UserError(f"{name} is {getattr(self, name)!r}, but {why}: leave it out")
        return repeats
