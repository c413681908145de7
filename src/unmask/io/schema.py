"""What the files of runs hold, and the check of a value read from JSON against it.

A schema is ``str``, ``bool``, ``None``, ``object`` (anything), ``float`` (any number, also NaN), a ``Number``, ``dict`` (any
object), ``[schema]`` (a list of it), ``[schema, n]`` (n of it), a tuple of alternatives, or an object ``{key: schema}``. There
a key with ``?`` may be missing, and ``...`` means all other keys, whose values may otherwise be anything.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

KINDS = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null", str: "text"}
KINDS |= {
    list: "a list",
    dict: "an object",
    object: "text, a number, true, false, null, list or object",
}


@dataclass(frozen=True)
class Number:
    """A finite number from ``low`` to ``high``."""

    low: float = -1e15
    high: float = 1e15
    whole: bool = False


def _fits(value: Any, schema: Any) -> bool:
    """Whether a value is of a schema's kind, whatever is in it."""
    if isinstance(schema, Number):
        return type(value) in ((int,) if schema.whole else (int, float)) and schema.low <= value <= schema.high
    if schema is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    if schema is object:
        return isinstance(value, str | int | float | list | dict | None)
    return isinstance(value, schema if isinstance(schema, type) else type(schema))


def _name(schema: Any) -> str:
    if isinstance(schema, Number):
        return f"a {'whole ' * schema.whole}number from {schema.low:g} to {schema.high:g}"
    return KINDS[schema if isinstance(schema, type) else type(schema)]


def check(value: Any, schema: Any, where: str = "it") -> None:
    """Raises ValueError, which names the place, unless a value read from a file matches its schema and has no lone surrogate
    (``\\ud800``), which cannot be written as UTF-8; RecursionError where it is nested too deeply."""
    kinds = schema if isinstance(schema, tuple) else (schema,)
    kind = next((k for k in kinds if _fits(value, k)), ...)
    if kind is ...:
        raise ValueError(f"{where} is {reprlib.repr(value)}, not {' or '.join(map(_name, kinds))}")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        inner, *count = kind if isinstance(kind, list) else [object]
        if count and len(value) != count[0]:
            raise ValueError(f"{where} has {len(value)} entries, not {count[0]}")
        for i, entry in enumerate(value):
            check(entry, inner, f"{where}[{i}]")
    elif isinstance(value, dict):
        known = kind if isinstance(kind, dict) else {}
        for key in known:
            if key is not ... and not key.endswith("?") and key not in value:
                raise ValueError(f"{where} lacks {key!r}")
        for key, entry in value.items():
            check(key, str, f"the key {key!r:.60}")
            inside = f"{key:.60}" if where == "it" else f"{where}.{key:.60}"
            check(entry, known.get(key, known.get(f"{key}?", known.get(..., object))), inside)


# ---- the files of runs ----------------------------------------------------------------------------------------------------

COUNT, POSITIVE = Number(0, whole=True), Number(1, whole=True)
AMOUNT, SHARE = Number(0), Number(0, 1)

METRICS = {"step": COUNT, ...: float}
"""A line of an ``rl`` run's metrics.jsonl; what a diverging run logs may not be finite."""
TIMES = {"step": COUNT, "seconds_rollout?": AMOUNT, "seconds_update?": AMOUNT}
MEASURED = {"index": COUNT, "id": str, "solved": bool, "points": AMOUNT, "possible": Number(1e-6)}
MEASURED |= {"nfe": POSITIVE, "committed": COUNT, "length": COUNT, "seconds": AMOUNT}
"""What is counted of a problem: with split and decoder, a line of ``tune``'s measurements.jsonl."""
RECORD = {**MEASURED, "task?": str, "decoder?": str, "prompt": str, "completion": str}
"""A line of ``eval``'s records."""
CONFIG = {"model": {"name": str, "weights": str, "dtype": str}, "tasks": {...: dict}, "decoders": {...: dict}}
CONFIG |= {"seed": Number(0, 2**30 - 1, whole=True), "early_stop": bool, "load_in_4bit": bool}
CONFIG |= {"adapter": (str, None), "revision": (str, None)}
"""``eval``'s config.json."""
STEPS = ("commits", "eos_share", "end_confidence", "other_confidence")
"""Which curves have one entry a step."""
CURVES = {"commits": [AMOUNT], **{key: [(SHARE, None)] for key in STEPS[1:]}, "order": [[(SHARE, None), 32], 16]}
_ROW = {"task": str, "decoder": str, "problems": POSITIVE, "solved": SHARE, "solved_interval": [SHARE, 2]}
_ROW |= {"score_name": str, "score": AMOUNT, "score_interval": [AMOUNT, 2], "nfe": Number(1)}
_ROW |= {"tokens_per_forward": AMOUNT, "length": AMOUNT, "seconds": AMOUNT, "curves?": CURVES}
SUMMARY = {"config": {"model": {"name": str}, "split": str}, "environment": dict, "cells": [_ROW]}
"""``eval``'s summary.json."""


def check_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises ValueError where there are no cells, or curves that belong together are not equally long."""
    if not summary["cells"]:
        raise ValueError("cells is empty")
    for cell in summary["cells"]:
        check_same_length(cell.get("curves", {}), *STEPS)
    return summary


def check_same_length(value: dict[str, Any], *keys: str) -> None:
    """Raises ValueError where those of the lists ``keys`` that are there have not as many entries each."""
    sizes = {key: len(value[key]) for key in keys if key in value}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{', '.join(f'{k} has {n} entries' for k, n in sizes.items())}: not as many each")
