"""The prompt and the seed of every problem of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmask.models.masked_lm import MaskedLM
from unmask.tasks import Problem, Task


def row_seeds(seed: int, indexes: Sequence[int]) -> torch.Tensor:
    """The seed of each problem's row, (len(indexes),) int64: it depends on nothing but the evaluation's seed and its index."""
    return torch.tensor([seed * 2**32 + i for i in indexes], dtype=torch.int64)


def task_prompts(lm: MaskedLM, task: Task, problems: Sequence[Problem], shots: int = 0, seed: int = 0) -> list[str]:
    """The prompt of every problem, behind ``shots`` worked examples of the training split where asked for."""
    examples = task.problems("train", shots, seed) if shots else []
    return [task.prompt(lm, problem, examples) for problem in problems]
