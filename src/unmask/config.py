"""Run configurations: one dataclass is the file's schema, the command line's flags and their documentation."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from unmask.files import as_yaml, read_yaml, write_text
from unmask.flags import read_flags
from unmask.spec import UserError, convert, default_of, expand_home, unknown

T = TypeVar("T")

# Every matrix of every block: LLaDA's names, then those of Qwen and Llama. The head outside the blocks is left alone.
LORA_TARGETS = (
    r"(.*\.)?(blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"
    r"|layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj))"
)


def command_config(cls: type[T], arguments: list[str], prog: str, about: str, **switches: str) -> T:
    """The configuration that ``CONFIG --key value …`` asks for.

    Args:
        about: the first sentence of the help, which lists the keys with their defaults. switches: further flags of the command
            and what they do, for the help.

    Raises:
        UserError: as ``read_config``, and where no file comes first.
        SystemExit: after ``--help``.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        file = Annotated[
            str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG", help="YAML file of the keys below.")
        ]
        own: list[Any] = [
            ("config", file),
            *((k, Annotated[bool, tyro.conf.arg(help=v)], False) for k, v in switches.items()),
        ]
        about += " The options are the keys of the file; each may follow as a flag, which then holds."
        kind = dataclasses.make_dataclass("Help", own, bases=(cls,), kw_only=True, namespace={"__doc__": about})
        read_flags(kind, arguments[:1], prog)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"{prog} lacks an argument: give a YAML file first, then flags; see {prog} --help")
    return read_config(cls, arguments[0], arguments[1:])


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
    draft = object.__new__(cls)  # unchecked: a check may take long, and a flag may mend what the file says
    given = {f.name: default_of(f) for f in dataclasses.fields(cls) if f.name not in values}  # type: ignore[arg-type]
    vars(draft).update(given | values)
    return read_flags(cls, arguments or [], prog, default=draft)


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
    write_text(path, as_yaml(dataclasses.asdict(config)))


def check_reporters(names: Collection[str]) -> None:
    """Raises UserError for the first name that is no logger of transformers, or one that is not installed."""
    # Only here: flags are read without it.
    from transformers.integrations import get_available_reporting_integrations, integration_utils

    for name in names:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            raise unknown("logger in report_to", name, integration_utils.INTEGRATION_TO_CALLBACK)
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to names {name!r}, which is not installed: pip install it or leave it out")
