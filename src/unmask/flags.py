"""Command lines into dataclasses; a mistake is one sentence."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import tyro

from unmask.spec import UserError, expand_paths, is_none

T = TypeVar("T")
_FRAME = re.compile(r"[│╭╮╰╯]")
_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _none(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[None] | None:
    """``none`` in every form that files and specs know."""
    if info.type is not type(None):
        return None

    def read(words: list[str]) -> None:
        if not is_none(words[0]):
            raise ValueError(f"{words[0]} is not none")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="none",
        instance_from_str=read,
        is_instance=lambda value: value is None,
        str_from_instance=lambda _: ["none"],
    )


def read_flags(kind: type[T], arguments: list[str], prog: str, **settings: Any) -> T:
    """``tyro.cli``, except that what it draws in a box is said in one sentence.

    Raises:
        UserError: for a flag that is unknown, misspelt, lacks its value or has a wrong one.
        SystemExit: after ``--help``.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _REGISTRY:
            found = tyro.cli(kind, args=arguments, prog=prog, **settings)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_sentence(said.getvalue(), prog)) from None
    for name, value in vars(found).items():
        if isinstance(value, list) and len(value) == 1 and is_none(value[0]):
            setattr(found, name, [])
    expand_paths(found)  # a shell leaves ~ in --output=~/x
    return found


def overview(prog: str, what: str, choices: Mapping[str, str]) -> str:
    """The help of a command that is a choice of others: their names, and what each does."""
    width = max(map(len, choices))
    rows = "".join(f"  {name:<{width}}  {does}\n" for name, does in choices.items())
    return f"usage: {prog} {what} …    ({prog} {what} --help for its options)\n\n{rows}"


def _sentence(box: str, prog: str) -> str:
    """A box of tyro's: its first part, and the flag that its part on near ones starts with."""
    lines = [_FRAME.sub("", line).strip() for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts: list[list[str]] = [[]]
    for line in filter(None, lines):
        if not line.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(line)
    if "╭" not in box:  # drawn in ASCII, with the title as a part
        del parts[0]
    what = " ".join(parts[0]).rstrip(".")
    if " Got errors:" in what:
        what = what.split(" Got errors:")[0].rstrip(". ")
    if what.startswith("Missing from"):  # a list of arguments with their help
        flags = [line.split()[0] for line in parts[0][1:] if line.startswith("--")]
        plain = sum(line == "STR" for line in parts[0])
        wanted = (["an argument"] if plain == 1 else [f"{plain} arguments"] if plain else []) + flags
        what = f"{prog} lacks {' and '.join(wanted)}"
    elif what[:1].isupper():
        what = what[0].lower() + what[1:]
    near = [part[1].split()[0] for part in parts if len(part) > 1 and part[0].startswith("Perhaps you meant")]
    hint = f"did you mean {near[0]}? " if near else ""
    if what.startswith("unrecognized") and re.search(r"\b(true|false|yes|no)\b", what, re.IGNORECASE):
        hint = "a switch takes no value, write --name or --no-name; "
    return f"{what}: {hint}see {prog} --help"
