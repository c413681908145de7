"""Studies: grids of trainings and evaluations with equal budgets, resumable, summarized over problems and seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

Values = dict[str, Any]
SEEDS = ("seed", "train.seed")
"""The axes that a summary pools instead of comparing."""
PLAN = "plan"
"""In a table, the name of the number of passes that a decoder's plan allows."""


def distinct(values: Iterable[Any]) -> list[Any]:
    """JSON values without their repetitions, in order."""
    return list({json.dumps(value): value for value in values}.values())
