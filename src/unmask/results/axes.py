"""What names and groups the cells of tables: axes, and what stands among them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

Table = dict[str, Any]
SEEDS = ("seed", "train.seed")
"""The axes that a summary pools instead of comparing."""
METRICS = ("solved", "score")
PLAN = "plan"
"""Stands among the axes of a table for the number of passes that a decoder's plan allows."""


def distinct(values: Iterable[Any]) -> list[Any]:
    """JSON values without their repetitions, in order."""
    return list({json.dumps(value): value for value in values}.values())
