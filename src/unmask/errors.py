"""The errors that a user can cause, and the checks of settings that raise them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake in what the user asked for. The message is one sentence that names the value and the fix."""


class TooFewProblems(UserError):
    """A split has fewer problems than were asked for."""


def unknown(kind: str, value: str, choices: Iterable[str], more: str = "") -> UserError:
    """The error for a name that is not one of the choices, with the nearest one suggested; ``more`` ends the list."""
    choices = sorted(map(str, choices))
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {value!r:.100}: {hint}choose from {', '.join(choices)}{more}")


def check_at_least(config: Any, low: int, *names: str) -> None:
    """Raises UserError for the first of the named fields whose value is below ``low``."""
    for name in names:
        if getattr(config, name) < low:
            raise UserError(f"{name} is {getattr(config, name)}: choose {low} or more")


def check_positive(config: Any, *names: str) -> None:
    """Raises UserError for the first of the named fields that is no positive finite number."""
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"{name} is {getattr(config, name)}: choose a positive number")


def check_seed(config: Any) -> None:
    """Raises UserError for a ``seed`` out of range: seeds of problems and rows are made from it."""
    if not 0 <= config.seed < 2**30:
        raise UserError(f"seed is {config.seed}: choose 0 to {2**30 - 1}")


def check_own_folder(output: str) -> None:
    """Raises UserError for an ``output`` that is the current folder or one above it."""
    if not output.strip(". "):
        raise UserError(f"output is {output!r}: choose an output folder other than the current one")
