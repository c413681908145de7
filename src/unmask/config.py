"""Settings from text: specs (``name:key=value,key=value``), flags and run files, read alike."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import tyro

from unmask.errors import UserError, unknown
from unmask.io.files import as_yaml, expand_home, read_yaml, write_text
from unmask.io.schema import KINDS

T = TypeVar("T")
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w-]*(?=[:,]|$)")
_REGISTRY = tyro.constructors.ConstructorRegistry()
LORA_TARGETS = (
    r"(.*\.)?(blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"
    r"|layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj))"
)


class Registry(dict[str, T]):
    """Things of one kind by name: shipped, added by ``register``, or any object as ``package.module:name``."""

    def __init__(self, kind: str, entries: Mapping[str, T] | None = None) -> None:
        super().__init__(entries or {})
        self.kind = kind

    def register(self, name: str) -> Callable[[Any], Any]:
        """A decorator that adds what it decorates, in place of an earlier entry of that name."""

        def add(thing: Any) -> Any:
            self[name] = thing
            return thing

        return add

    def resolve(self, name: str) -> T:
        """The entry or imported object; modules are also looked for in the current folder. Raises UserError."""
        if name in self:
            return self[name]
        if not _IMPORT_PATH.fullmatch(name):
            raise unknown(self.kind, name, self, ", or one of your own as package.module:name")
        module, attribute = name.split(":")
        if module in self:
            raise UserError(f"cannot read {attribute!r} in {name!r}: parameters are written name:key=value,key=value")
        before = [*sys.path]
        sys.path.append("")  # a console script does not look there
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:  # noqa: BLE001  (a user's module may raise anything)
            raise UserError(f"cannot import {self.kind} {name!r}: {type(error).__name__}: {error}") from None
        finally:
            sys.path[:] = before


def expand_paths(settings: Any) -> None:
    """``expand_home`` for every field of a dataclass except prompts, which are literal text."""
    for name in {f.name for f in dataclasses.fields(settings)} - {"prompt", "prefill"}:
        setattr(settings, name, expand_home(getattr(settings, name)))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field that has one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def with_parameters(spec: str, **parameters: Any) -> str:
    """``("ass:blocks=4", temperature=1)`` -> ``"ass:blocks=4,temperature=1"``."""
    more = ",".join(f"{key}={value}" for key, value in parameters.items())
    return f"{spec}{',' if split_spec(spec)[1] else ':'}{more}" if more else spec


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """``"ass:blocks=4,temperature=1"`` -> ``("ass", {"blocks": "4", "temperature": "1"})``. Raises UserError."""
    path = _IMPORT_PATH.match(spec.strip())
    name, _, rest = (path[0], "", spec.strip()[path.end() + 1 :]) if path else spec.strip().partition(":")
    parameters: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UserError(f"cannot read {part!r} in {spec!r}: parameters are written name:key=value,key=value")
        if key.strip() in parameters:
            raise UserError(f"{key.strip()!r} is given twice in {spec!r}: write it once")
        parameters[key.strip()] = value.strip()
    return expand_home(name), parameters


def is_none(value: Any) -> bool:
    """Whether a value of a file, flag or spec is none: ``none`` or ``null`` in any case, YAML's null, or a list of one such."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))


def convert(value: Any, hint: Any, where: str) -> Any:
    """A value (often text) as the type that a dataclass field declares; UserError names the field otherwise."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if is_none(value) and type(None) in arms:
        return None
    for arm in (a for a in arms if a is not type(None)):
        kind = typing.get_origin(arm) or arm
        if kind is list and is_none(value):
            return []
        if kind is list and isinstance(value, list | str):  # one text is a list of one
            return [convert(v, typing.get_args(arm)[0], where) for v in ([value] if isinstance(value, str) else value)]
        if kind is typing.Literal:
            if value in typing.get_args(arm):
                return value
            raise unknown(where, str(value), map(str, typing.get_args(arm)))
        if kind is bool and str(value).lower() in ("true", "false", "1", "0", "yes", "no"):
            return str(value).lower() in ("true", "1", "yes")
        if kind is str and isinstance(value, str):
            return expand_home(value)
        if kind is dict and isinstance(value, dict):
            return value
        if kind in (int, float) and not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                number = kind(value)
                if kind is float or not isinstance(value, float) or number == value:
                    return number
    names = " or ".join({**KINDS, dict: "a table", type(None): "none"}[typing.get_origin(a) or a] for a in arms)
    raise UserError(f"{where} is {value!r:.100}: choose {names}")


def _typed(cls: type, values: Mapping[str, Any], kind: str, of: str) -> dict[str, Any]:
    hints, fields = typing.get_type_hints(cls), [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in fields:
            raise unknown(f"{kind} {of}", str(key), fields)
    return {k: convert(v, hints[k], f"{k} {of}") for k, v in values.items()}


def build(cls: type[T], parameters: Mapping[str, Any], what: str) -> T:
    """A dataclass from text or file values. Raises UserError, which calls it ``what``, for an unknown name or a wrong type."""
    return cls(**_typed(cls, parameters, "parameter", f"of {what}"))


@_REGISTRY.primitive_rule
def _none(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[None] | None:
    """None in every spelling of ``is_none``."""

    def read(words: list[str]) -> None:
        if not is_none(words[0]):
            raise ValueError(f"{words[0]} is not none")

    spec = tyro.constructors.PrimitiveConstructorSpec[None](1, "none", read, is_none, lambda _: ["none"])
    return spec if info.type is type(None) else None


def read_flags(kind: type[T], arguments: list[str], prog: str, **settings: Any) -> T:
    """``tyro.cli``, with the error that it draws in a box as one sentence of a UserError. SystemExit follows ``--help``."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _REGISTRY:
            found = tyro.cli(kind, args=arguments, prog=prog, **settings)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_sentence(said.getvalue(), prog)) from None
    for name, value in vars(found).items():
        if isinstance(value, list) and is_none(value):
            setattr(found, name, [])
    expand_paths(found)  # a shell leaves ~ in --output=~/x
    return found


def overview(prog: str, what: str, choices: Mapping[str, str]) -> str:
    """The help of a command that is a choice of others: their names, and what each does."""
    rows = "".join(f"  {name:<{max(map(len, choices))}}  {does}\n" for name, does in choices.items())
    return f"usage: {prog} {what} …    ({prog} {what} --help for its options)\n\n{rows}"


def _sentence(box: str, prog: str) -> str:
    """The parser's message, which it draws in a box, as one sentence, with the nearest flag."""
    text = re.sub("[│╭╮╰╯]", "", box.split("\n", 1)[1])  # without its title
    what, *others = (part for part in re.split(r"[─-]{8,}", text) if part.strip())
    if missing := re.findall(r"^ {4,6}(--[\w-]+|[A-Z]+\b)", what, re.MULTILINE) if "Missing from" in what else []:
        what = f"{prog} lacks {' and '.join(dict.fromkeys('arguments' if m.isupper() else m for m in missing))}"
    what = " ".join(what.split()).split(" Got errors:")[0].rstrip(". ")
    near = [part.split()[3] for part in others if part.strip().startswith("Perhaps you meant")]
    hint = f"did you mean {near[0]}? " if near else ""
    if re.search(r"^Unrecognized.*\b(true|false|yes|no)\b", what, re.IGNORECASE):
        hint = "a switch takes no value, write --name or --no-name; "
    return f"{what if missing else what[0].lower() + what[1:]}: {hint}see {prog} --help"


def command_config(cls: type[T], arguments: list[str], prog: str, about: str) -> T:
    """The configuration of ``CONFIG --key value …``. ``about`` begins the help, which lists the keys.

    Raises UserError as ``read_config`` and where no file comes first, SystemExit after ``--help``.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        about += " CONFIG is a YAML file of the keys below; each is also a flag, which overrides the file."
        read_flags(cls, arguments[:1], f"{prog} CONFIG", description=about)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"{prog} lacks an argument: pass a YAML file first, then flags; see {prog} --help")
    return read_config(cls, arguments[0], arguments[1:])


def read_config(cls: type[T], path: str | Path, arguments: list[str] | None = None) -> T:
    """A dataclass from a YAML file over the file that its key ``base`` names (relative to it), overridden by flags.

    Raises UserError for an unreadable file, an unknown key (with the nearest one), or a value of the wrong type.
    """
    values = _typed(cls, _read(Path(expand_home(str(path)))), "key", f"in {path}")
    draft = object.__new__(cls)  # unchecked: a check may take long, and a flag may correct what the file says
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise UserError(f"{path} lacks {f.name}: add it")
        vars(draft)[f.name] = values[f.name] if f.name in values else default_of(f)
    prog = f"unmask {getattr(cls, 'command', cls.__name__.removesuffix('Config').lower())} {path}"
    return read_flags(cls, arguments or [], prog, default=draft)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file over those of its ``base``."""
    if path in above:
        raise UserError(f"base of {above[-1]} is {path}: choose a file that does not lead back to it")
    values = read_yaml(path, f"the base of {above[-1]}," if above else "the config")
    base = convert(values.pop("base", None), str | None, f"base of {path}")
    return {**_read(path.parent / base, (*above, path)), **values} if base else values


def save_config(config: Any, path: Path) -> None:
    """Write the resolved configuration into a run's folder, atomically."""
    write_text(path, as_yaml(dataclasses.asdict(config)))


def check_reporters(names: Collection[str]) -> None:
    """Raises UserError for the first name that is no logger of transformers, or one that is not installed."""
    from transformers.integrations import get_available_reporting_integrations  # heavy

    for name in names:
        if name not in (known := get_available_reporting_integrations()):
            raise UserError(f"unknown logger in report_to {name!r}: choose from those installed, {', '.join(known)}")
