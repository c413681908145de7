"""Run configurations: one dataclass is the file's schema, the command line's flags and their documentation."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, TypeVar

from unmask.files import as_yaml, read_yaml, whole
from unmask.flags import read_flags
from unmask.spec import UserError, convert, expand_home, unknown

T = TypeVar("T")


def read_config(cls: type[T], path: str | Path, arguments: list[str] | None = None) -> T:
    """A dataclass from a YAML file, then flags (``--steps 2``) over it.

    The key ``base`` names another file, beside this one, whose values hold where this one sets none.

    Raises:
        UserError: for an unreadable file, an unknown key (with the nearest one), or a value of the wrong type.
    """
    values = _read(Path(expand_home(str(path))))
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise unknown(f"key in {path}", str(key), hints)
        values[key] = convert(value, hints[key], f"{key} in {path}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: add it")
    prog = f"unmask {cls.__name__.removesuffix('Config').lower()} {path}"
    return read_flags(cls, arguments or [], prog, default=cls(**values))


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file over those of its ``base``."""
    values = read_yaml(path, "the config" if not above else f"the base of {above[-1]},")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or path in above:
        raise UserError(f"base of {path} is {base!r}: give another file, which does not lead back here")
    return {**_read(path.parent / expand_home(base), (*above, path)), **values}


def save_config(config: Any, path: Path) -> None:
    """Write the resolved configuration beside a run's results, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(as_yaml(dataclasses.asdict(config)), encoding="utf-8")
