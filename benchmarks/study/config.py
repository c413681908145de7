"""A study's file: read without torch, so that help and a typo answer at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from unmask.config import expand_paths
from unmask.errors import UserError, check_at_least, check_own_folder


@dataclass
class StudyConfig:
    """A grid of evaluations, of the models that a grid of trainings makes where there is one."""

    output: str
    """The study's folder."""
    evaluate: Annotated[list[dict[str, Any]], tyro.conf.Suppress] = field(default_factory=list)
    """Tables of ``unmask eval`` settings and Decoder fields."""
    train: Annotated[list[dict[str, Any]], tyro.conf.Suppress] = field(default_factory=list)
    """Tables of ``unmask rl`` settings; ``base`` names a file, beside this one, whose values hold where a table sets none."""
    compare: list[str] = field(default_factory=list)
    """Axes along which cells are compared with their first value; by default all but the task."""
    baselines: list[str] = field(default_factory=list)
    """Decoders, as ``evaluate`` names them, with which every other one of as many passes is compared."""
    tables: Annotated[list[dict[str, Any]], tyro.conf.Suppress] = field(default_factory=list)
    """Tables for reading, ``Pivot`` settings, at the head of ``table.md``."""
    jobs: int = 1
    """Jobs at a time, each in a process of its own; the cores are shared out, and GPUs are taken in turn."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_at_least(self, 1, "jobs")
        check_own_folder(self.output)
        if not self.evaluate:
            raise UserError("evaluate needs at least one table, with the tasks and decoders to evaluate")
