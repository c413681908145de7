"""What the files of runs hold, and the check of a value read from JSON against it.

A schema is ``str``, ``bool``, ``None``, ``object`` (anything), ``float`` (any number, also NaN), a ``Number``, ``dict`` (any
object), ``[schema]`` (a list of it), ``[schema, n]`` (n of it), a tuple of alternatives, or an object ``{key: schema}``. There
a key with ``?`` may be missing, and ``...`` stands for all other keys, whose values may else be anything.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

DEEPEST = 32
"""Levels of lists and objects that a file may have."""


@dataclass(frozen=True)
class Number:
    """A finite number from ``low`` to ``high``."""

    low: float = -1e15
    high: float = 1e15
    whole: bool = False

    def __str__(self) -> str:
        return f"a {'whole ' * self.whole}number from {self.low:g} to {self.high:g}"


def _fits(value: Any, schema: Any) -> bool:
    """Whether a value is of a schema's kind, whatever is in it."""
    if isinstance(schema, Number):
        number = type(value) is int or (type(value) is float and not schema.whole)
        return number and schema.low <= value <= schema.high
    if schema is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    kind = schema if isinstance(schema, type) else type(schema)
    return isinstance(value, kind)


def _said(schema: Any) -> str:
    if isinstance(schema, Number):
        return str(schema)
    kind = schema if isinstance(schema, type) or schema is None else type(schema)
    words: dict[Any, str] = {
        str: "text",
        bool: "true or false",
        None: "null",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return words[kind]


def check(value: Any, schema: Any, where: str = "it", level: int = 0) -> None:
    """Raises ValueError, which says what is wrong at which place, unless a value read from JSON is as its schema says."""
    kinds = schema if isinstance(schema, tuple) else (schema,)
    kind = next((k for k in kinds if _fits(value, k)), ...)
    if kind is ...:
        raise ValueError(f"{where} is {reprlib.repr(value)}, not {' or '.join(map(_said, kinds))}")
    if level > DEEPEST:
        raise ValueError(f"{where} lies more than {DEEPEST} levels deep")
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, list):
        inner, *count = kind if isinstance(kind, list) else [object]
        if count and len(value) != count[0]:
            raise ValueError(f"{where} has {len(value)} entries, not {count[0]}")
        for i, entry in enumerate(value):
            check(entry, inner, f"{where}[{i}]", level + 1)
    elif isinstance(value, dict):
        known = kind if isinstance(kind, dict) else {}
        for key in known:
            if key is not ... and not key.endswith("?") and key not in value:
                raise ValueError(f"{where} lacks {key!r}")
        for key, entry in value.items():
            _check_text(key, "a key")
            inside = f"{key:.60}" if where == "it" else f"{where}.{key:.60}"
            check(entry, known.get(key, known.get(f"{key}?", known.get(..., object))), inside, level + 1)


def _check_text(text: str, where: str) -> None:
    """Raises ValueError for half a character (``\\ud800``), which no file and no terminal takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} holds half a character") from None


def check_alike(value: dict[str, Any], *keys: str) -> None:
    """Raises ValueError unless what stands under all of the keys is equally long."""
    sizes = {key: len(value[key]) for key in keys}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{', '.join(f'{k} has {n} entries' for k, n in sizes.items())}: not as many each")


# ---- what there is in which file -------------------------------------------------------------------------------------------

COUNT, POSITIVE = Number(0, whole=True), Number(1, whole=True)
AMOUNT, SHARE = Number(0), Number(0, 1)
_MAYBE = [(SHARE, None)]

METRICS = {"step": COUNT, ...: float}
"""A line of an ``rl`` run's metrics.jsonl; what a diverging run logs may not be finite."""
TIMES = {"step": COUNT, "seconds_rollout?": AMOUNT, "seconds_update?": AMOUNT}
MEASURED = {
    "index": COUNT,
    "id": str,
    "solved": bool,
    "points": AMOUNT,
    "possible": Number(1e-6),
    "nfe": POSITIVE,
    "committed": COUNT,
    "length": COUNT,
    "seconds": AMOUNT,
}
"""What is counted of a problem: the records of ``tune``'s measurements.jsonl."""
RECORD = {**MEASURED, "task?": str, "decoder?": str, "prompt": str, "completion": str}
"""A line of ``eval``'s records."""
CONFIG = {
    "model": dict,
    "tasks": {...: dict},
    "decoders": {...: dict},
    "limit?": (POSITIVE, None),
}
"""``eval``'s and ``tune``'s config.json."""
CURVES = {
    "commits": [AMOUNT],
    "eos_share": _MAYBE,
    "end_confidence": _MAYBE,
    "other_confidence": _MAYBE,
    "order": [[(SHARE, None), 32], 16],
}
STEPS = ("commits", "eos_share", "end_confidence", "other_confidence")
"""Which curves have one entry a step."""
_DIAGNOSED = {"task": str, "decoder": str, "eos_share": _MAYBE, "eos_confidence": _MAYBE, "other_confidence": _MAYBE}
SUMMARY = {
    "config": {"model": {"name": str}, "split": str},
    "environment": dict,
    "cells": [
        {
            "task": str,
            "decoder": str,
            "score_name": str,
            "problems": POSITIVE,
            "solved": SHARE,
            "solved_interval": [SHARE, 2],
            "score": AMOUNT,
            "score_interval": [AMOUNT, 2],
            "nfe": Number(1),
            "tokens_per_forward": AMOUNT,
            "length": AMOUNT,
            "seconds": AMOUNT,
            "curves?": CURVES,
        }
    ],
    "diagnostics?": [_DIAGNOSED],
}
"""``eval``'s summary.json."""


def whole_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises ValueError where curves that belong together are not equally long."""
    for cell in summary["cells"]:
        if "curves" in cell:
            check_alike(cell["curves"], *STEPS)
    for curves in summary.get("diagnostics", []):
        check_alike(curves, "eos_share", "eos_confidence", "other_confidence")
    return summary


_TRAINED = {"updates": COUNT, "completions": COUNT, "training_passes": COUNT}
CELL = {
    "key": str,
    "cell": {"task": str, "decoder": str},
    "budget": {"nfe": POSITIVE, **{f"{k}?": v for k, v in _TRAINED.items()}},
    "score_name": str,
    "model": {"name": str, "weights": str},
    "problems": str,
    "solved": str,
    "points": [AMOUNT],
    "possible": [Number(1e-6)],
    "nfe": [POSITIVE],
    "length": [COUNT],
    "committed": [COUNT],
    "seconds": AMOUNT,
    "curves?": CURVES,
    "environment": dict,
}
"""A line of a study's cells.jsonl."""


def whole_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises ValueError where its lists have not an entry a problem, or its curves not an entry a step."""
    if not cell["solved"] or set(cell["solved"]) - {"0", "1"}:
        raise ValueError("solved is not a 0 or 1 for each problem")
    check_alike(cell, "solved", "points", "possible", "nfe", "length", "committed")
    if "curves" in cell:
        check_alike(cell["curves"], *STEPS)
    return cell


RUN = {
    "key": str,
    "train": dict,
    "budget": _TRAINED,
    "metrics": [METRICS],
    "seconds": {"rollout": AMOUNT, "update": AMOUNT},
}
"""A line of a study's runs.jsonl."""
