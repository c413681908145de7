"""``name:key=value,key=value`` — the one syntax for decoders and tasks on the command line and in files."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake in what the user asked for. The message is one sentence that names the value and the fix."""


class TooFewProblems(UserError):
    """A split does not have as many problems as were asked for."""


def unknown(kind: str, value: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is not one of the choices, with the nearest one suggested."""
    choices = sorted(map(str, choices))
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {value!r:.100}: {hint}choose from {', '.join(choices)}")


def check_at_least(config: Any, low: int, *names: str) -> None:
    """Raises UserError for the first of the named fields whose value is below ``low``."""
    for name in names:
        if getattr(config, name) < low:
            raise UserError(f"{name} is {getattr(config, name)}: give {low} or more")


def check_positive(config: Any, *names: str) -> None:
    """Raises UserError for the first of the named fields that is no positive finite number."""
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"{name} is {getattr(config, name)}: give a positive number")


def check_seed(config: Any) -> None:
    """Raises UserError for a ``seed`` out of range: seeds of problems and rows are made from it."""
    if not 0 <= config.seed < 2**30:
        raise UserError(f"seed is {config.seed}: give 0 to {2**30 - 1}")


def check_own_folder(output: str) -> None:
    """Raises UserError for an ``output`` that is the folder the command was started in, or above it."""
    if not output.strip(". "):
        raise UserError(f"output is {output!r}: give a folder of its own")


def expand_home(value: T) -> T:
    """Text that starts with ``~`` as a path from the home folder; lists entry by entry; anything else as it is."""
    if isinstance(value, list):
        return [expand_home(v) for v in value]  # type: ignore[return-value]
    return os.path.expanduser(value) if isinstance(value, str) else value  # type: ignore[return-value]


def read_typed(text: str) -> str:
    """Text of a command line; bytes that the locale could not read are read as UTF-8. Raises UserError where they are not."""
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise UserError(
            f"{text[:40]!r} is not UTF-8 text: write it as UTF-8, or set the locale it is written in"
        ) from None


def expand_paths(settings: Any) -> None:
    """``expand_home`` for every field of a dataclass but those that hold text as a person wrote it."""
    for name in {f.name for f in dataclasses.fields(settings)} - {"prompt", "prefill"}:
        setattr(settings, name, expand_home(getattr(settings, name)))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value that a field with a default takes where none is given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def with_parameters(spec: str, **parameters: Any) -> str:
    """``("ass:blocks=4", temperature=1)`` -> ``"ass:blocks=4,temperature=1"``."""
    more = ",".join(f"{key}={value}" for key, value in parameters.items())
    return f"{spec}{',' if ':' in spec else ':'}{more}" if more else spec


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """``"ass:blocks=4,temperature=1"`` -> ``("ass", {"blocks": "4", "temperature": "1"})``. Raises UserError."""
    name, _, rest = spec.strip().partition(":")
    parameters: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UserError(f"cannot read {part!r} in {spec!r}: parameters are written name:key=value,key=value")
        if key.strip() in parameters:
            raise UserError(f"{key.strip()!r} is given twice in {spec!r}: give it once")
        parameters[key.strip()] = value.strip()
    return expand_home(name), parameters


def is_none(value: Any) -> bool:
    """Whether a value of a file, a flag or a spec says none: ``none`` and ``null`` in any case, and YAML's null."""
    return value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))


def convert(value: Any, hint: Any, where: str) -> Any:
    """A value (often text) as the type that a dataclass field declares; UserError names the field otherwise."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if is_none(value) and type(None) in arms:
        return None
    for arm in (a for a in arms if a is not type(None)):
        if typing.get_origin(arm) is list and is_none(value):
            return []
        if typing.get_origin(arm) is list and isinstance(value, (list, str)):  # one text is a list of one
            return [convert(v, typing.get_args(arm)[0], where) for v in ([value] if isinstance(value, str) else value)]
        if typing.get_origin(arm) is dict and isinstance(value, dict):
            return value
        if typing.get_origin(arm) is typing.Literal:
            if value in typing.get_args(arm):
                return value
            raise unknown(where, str(value), map(str, typing.get_args(arm)))
        if arm is bool:
            if isinstance(value, bool):
                return value
            if str(value).lower() in ("true", "false", "1", "0", "yes", "no"):
                return str(value).lower() in ("true", "1", "yes")
        elif arm in (int, float) and not isinstance(value, bool):
            try:
                number = arm(value)
            except (TypeError, ValueError, OverflowError):
                continue
            if arm is float or not isinstance(value, float) or number == value:
                return number
        elif arm is str and isinstance(value, str):
            return expand_home(value)
    names = " or ".join(getattr(a, "__name__", str(a)) for a in arms)
    raise UserError(f"{where} is {value!r:.100}: give {names.replace('NoneType', 'none')}")


def build(cls: type[T], parameters: Mapping[str, Any], what: str) -> T:
    """A dataclass from text or file values: unknown keys and wrong types are UserErrors that name the choices.

    Args:
        cls: a dataclass whose fields are int, float, bool, str, Literal or an optional of these.
        parameters: field name -> value, as text or already typed.
        what: how to call it in an error, e.g. ``"decoder 'ass'"``.
    """
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for key in parameters:
        if key not in fields:
            raise unknown(f"parameter of {what}", key, fields)
    return cls(**{k: convert(v, hints[k], f"{k} of {what}") for k, v in parameters.items()})
