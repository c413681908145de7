"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from unmask.errors import UserError
from unmask.io.schema import DEEPEST, check

T = TypeVar("T")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it takes ``path``'s place only if the block ends well."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing_to(output: Path | str, instead: str = "--output") -> Iterator[None]:
    """Turns an OSError of the block into the UserError that names the output and the flag that changes it."""
    try:
        yield
    except BrokenPipeError:
        raise  # what it says meanwhile finds no reader: no fault of the output
    except (OSError, UnicodeEncodeError) as error:  # the latter: a name that the locale does not have
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot write to {output}: {reason}; choose another {instead}") from None


def folder_removed(folder: Path) -> UserError:
    return UserError(f"{folder} was removed while the run wrote to it: run the same command again, which starts anew")


def check_writable(output: Path) -> None:
    """Raises UserError where a result file cannot be written: before anything is measured for it. An earlier result stays."""
    with writing_to(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        there = output.exists()
        output.open("a", encoding="utf-8").close()
        if not there:
            output.unlink()


def read_text(path: Path | str, what: str = "") -> str:
    """A UTF-8 text file without its byte-order mark, lines ended by newlines.

    Raises:
        UserError: for a file that cannot be read, called ``what`` and its path, or the first line that is not UTF-8.
    """
    file = f"{what} {path}" if what else path
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise UserError(f"cannot read {file}: line {line} is not UTF-8 ({byte}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a path that the system cannot have
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', error)}; check the path") from None


def write_text(path: Path, text: str) -> None:
    """A UTF-8 text file, whole or not at all. Bytes of a file name that the locale could not read are escaped, also in JSON."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---- YAML ------------------------------------------------------------------------------------------------------------------

MOST_VALUES = 100_000
"""Values of a YAML file, with every alias written out."""
_TAG, _POWER = "tag:yaml.org,2002:", r"[eE][-+]?[0-9]+"
_NUMBERS = {
    "int": r"[-+]?(?:0b[01_]+|0[0-7_]*|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$",
    "float": rf"(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*(?:{_POWER})?|{_POWER})|\.[0-9][0-9_]*(?:{_POWER})?|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN))$",
}


class _Loader(yaml.SafeLoader):
    """Plain YAML with numbers as in YAML 1.2 (1e-5 is one, 12:30 is not); dates are text, other types are refused."""

    def get_single_node(self) -> yaml.Node | None:
        """The document. Raises YAMLError for other types, keys that are no text or stand twice, and more or deeper values than
        MOST_VALUES and DEEPEST with aliases written out."""
        root = super().get_single_node()
        waiting, count = [(root, 1)] if root is not None else [], 0
        while waiting:
            (node, level), count, keys = waiting.pop(), count + 1, set()
            if level > DEEPEST or count > MOST_VALUES:
                raise yaml.YAMLError(f"it holds more than {DEEPEST} levels or {MOST_VALUES:,} values")
            if node.tag.removeprefix(_TAG) not in ("null", "bool", "int", "float", "str", "seq", "map"):
                raise yaml.MarkedYAMLError(None, None, f"the tag {node.tag:.60} is not read", node.start_mark)
            for child in node.value if isinstance(node, yaml.CollectionNode) else ():
                key, value = child if isinstance(child, tuple) else (None, child)
                if key is not None:
                    text = key.tag in (_TAG + "str", _TAG + "merge")
                    if not text or key.value in keys:
                        said = f"the key {key.value!r:.60} stands twice" if text else "a key is no text"
                        raise yaml.MarkedYAMLError(None, None, said, key.start_mark)
                    keys.add(key.value)
                waiting.append((value, level + 1))
        return root


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back as it was."""


_Loader.yaml_implicit_resolvers = _Dumper.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.removeprefix(_TAG) in ("bool", "null", "merge")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list("-+.0123456789"))


def as_yaml(value: Any) -> str:
    """YAML that ``read_yaml`` reads back as the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path, what: str, schema: Any = dict) -> dict[str, Any]:
    """A YAML file of settings. Raises UserError, which calls the file ``what``, where it is none or not as ``schema`` says."""
    text = read_text(path, what)
    try:
        found: dict[str, Any] = yaml.load(text, Loader=_Loader)
        check(found, schema)
    except _DAMAGE as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        file = f"{what} {path}, line {mark.line + 1}" if mark else f"{what} {path}"
        raise UserError(f"{file} is not a table of settings ({_reason(error)}): write lines of key: value") from None
    return found


# ---- JSON ------------------------------------------------------------------------------------------------------------------

_DAMAGE = (yaml.YAMLError, ValueError, TypeError, KeyError, OverflowError, RecursionError)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"it has more than {DEEPEST} levels"
    said = f"it lacks {error}" if isinstance(error, KeyError) else getattr(error, "problem", None) or str(error)
    return " ".join(said.split())[:150]


def read_json(path: Path, schema: Any, fix: str, make: Callable[[Any], Any] = lambda value: value) -> Any:
    """The value in a JSON file; arguments and errors as for ``each_line``."""
    try:
        return _parse(path.read_bytes(), schema, f"{path} is damaged", fix, make)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {fix}") from None


def each_line(
    path: Path, schema: Any, fix: str, make: Callable[[Any], Any] = lambda value: value, own: bool = True
) -> Iterator[Any]:
    """The lines of a JSON-lines file, one at a time, each as its schema (``schema.py``) says.

    Args:
        fix: what to do where a line is not, as the end of a sentence.
        make: what becomes of a line; a ValueError, KeyError, TypeError or OverflowError of it is the line's mistake.
        own: whether a run writes the file: then it may be missing, and a last line that is not (yet) whole is passed over.
            Else empty lines are.

    Raises:
        UserError: naming the file and the first line that is something else.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.endswith(b"\n") if own else raw.strip():
                    wrong = f"{path}:{number} {'is damaged' if own else 'cannot be used'}"
                    yield _parse(raw, schema, wrong, fix, make)
    except OSError as error:
        if not own or not isinstance(error, FileNotFoundError):
            raise UserError(f"cannot read {path}: {error.strerror}; {fix}") from None


def read_lines(path: Path, schema: Any = dict, fix: str = "remove it") -> list[dict[str, Any]]:
    """The whole lines of a file that a run writes, as ``each_line`` reads them."""
    return list(each_line(path, schema, fix))


def _parse(raw: bytes, schema: Any, wrong: str, fix: str, make: Callable[[Any], Any]) -> Any:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        check(value, schema)
        return make(value)
    except _DAMAGE as error:
        raise UserError(f"{wrong} ({_reason(error)}): {fix}") from None


# ---- text and names --------------------------------------------------------------------------------------------------------


def expand_home(value: T) -> T:
    """Text that starts with ``~`` as a path from the home folder; lists entry by entry; anything else as it is."""
    if isinstance(value, list):
        return [expand_home(v) for v in value]  # type: ignore[return-value]
    return os.path.expanduser(value) if isinstance(value, str) else value  # type: ignore[return-value]


def as_utf8(text: str) -> str:
    """Text of a command line; bytes that the locale could not read are read as UTF-8. Raises UserError where they are not."""
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise UserError(
            f"{text[:40]!r} is not UTF-8 text: write it as UTF-8, or set the locale it is written in"
        ) from None


def slug(text: str) -> str:
    """A file name for a spec, of at most 109 characters; a hash keeps apart what cutting and replacing would confuse."""
    plain = re.sub(r"[^A-Za-z0-9.+=-]+", "_", text).strip("_")[:100]
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    return plain if plain == text else f"{plain}-{digest[:8]}"
