"""Files: written atomically, and checked where they are read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from unmask.errors import UserError
from unmask.io.schema import check


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
    """Turns an OSError of the block into a UserError that names the output and the flag that changes it."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the progress display has gone: no fault of the output
    except (OSError, UnicodeEncodeError) as error:  # the latter: a name that the locale does not have
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot write to {output}: {reason}; choose another {instead}") from None


def folder_removed(folder: Path) -> UserError:
    return UserError(f"{folder} was removed while the run wrote to it: run the same command again, which starts anew")


def check_writable(output: Path) -> None:
    """Raises UserError, before anything is computed, where a result file cannot be written. An earlier result stays."""
    with writing_to(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        exists = output.exists()
        output.open("a", encoding="utf-8").close()
        if not exists:
            output.unlink()


def read_text(path: Path | str, what: str = "") -> str:
    """A UTF-8 text file without its byte-order mark. Raises UserError, which calls the file ``what`` and its path."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: other encodings, a path that the system cannot have
        reason, file = getattr(error, "strerror", error), f"{what} {path}".strip()
        fix = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "check the path"
        raise UserError(f"cannot read {file}: {reason}; {fix}") from None


def write_text(path: Path, text: str) -> None:
    """A UTF-8 text file, atomically. Bytes of a file name that the locale could not read are escaped, also in JSON."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


_DAMAGE = (yaml.YAMLError, ValueError, TypeError, KeyError, OverflowError, RecursionError)


def _reason(error: Exception) -> str:
    message = f"it lacks {error}" if isinstance(error, KeyError) else getattr(error, "problem", None) or str(error)
    return " ".join(message.split())[:150]


MOST_VALUES = 100_000
"""Values of a YAML file, with every alias written out."""


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2 (1e-5 is one, 12:30 and dates are text); a key may occur only once in a table."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.CollectionNode):  # counted with aliases written out, before anything is
            inner = [n for entry in node.value for n in (entry if isinstance(entry, tuple) else (entry,))]
            self.sizes[node] = 1 + sum(self.sizes.get(n, 1) for n in inner)
            if self.sizes[node] > MOST_VALUES:
                raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r:.60} occurs twice", key.start_mark)
            seen.add(str(key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back as it was."""


_POWER = r"[eE][-+]?[0-9]+"
_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$",
    "float": rf"(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*(?:{_POWER})?|{_POWER})|\.[0-9][0-9_]*(?:{_POWER})?|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN))$",
}
for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _name, _pattern in _NUMBERS.items():
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list("-+.0123456789"))


def as_yaml(value: Any) -> str:
    """YAML that ``read_yaml`` reads back as the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path, what: str, schema: Any = dict) -> dict[str, Any]:
    """A YAML file of settings. Raises UserError, which calls the file ``what``, where it does not match ``schema``."""
    text = read_text(path, what)
    try:
        found: dict[str, Any] = yaml.load(text, Loader=_Loader)
        check(found, schema)
    except _DAMAGE as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        file = f"{what} {path}, line {mark.line + 1}" if mark else f"{what} {path}"
        raise UserError(f"{file} is not a table of settings ({_reason(error)}): write lines of key: value") from None
    return found


def parse_json(
    text: str | bytes, schema: Any, wrong: str, fix: str, make: Callable[[Any], Any] = lambda value: value
) -> Any:
    """The value of a JSON text. Raises UserError, "``wrong`` (the reason): ``fix``", where it does not match ``schema``."""
    try:
        value = json.loads(text)
        check(value, schema)
        return make(value)
    except _DAMAGE as error:
        raise UserError(f"{wrong} ({_reason(error)}): {fix}") from None


def read_json(path: Path, schema: Any, fix: str, make: Callable[[Any], Any] = lambda value: value) -> Any:
    """The value in a JSON file; arguments and errors as for ``each_line``."""
    try:
        return parse_json(path.read_bytes(), schema, f"{path} is damaged", fix, make)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {fix}") from None


def each_line(
    path: Path, schema: Any, fix: str, make: Callable[[Any], Any] = lambda value: value, own: bool = True
) -> Iterator[Any]:
    """The lines of a JSON-lines file. Raises UserError naming the first line that does not match ``schema``.

    Args:
        fix: what to do about such a line: the end of the message.
        make: applied to each line; a ValueError, KeyError, TypeError or OverflowError of it is the line's mistake.
        own: whether a run writes the file: it may be missing, and an unfinished last line is skipped. Else empty lines are.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.endswith(b"\n") if own else raw.strip():
                    wrong = f"{path}:{number} {'is damaged' if own else 'cannot be used'}"
                    yield parse_json(raw, schema, wrong, fix, make)
    except OSError as error:
        if not own or not isinstance(error, FileNotFoundError):
            raise UserError(f"cannot read {path}: {error.strerror}; {fix}") from None


def read_lines(path: Path, schema: Any = dict, fix: str = "remove it") -> list[dict[str, Any]]:
    """The finished lines of a file that a run writes."""
    return list(each_line(path, schema, fix))


def expand_home(value: Any) -> Any:
    """Text that starts with ``~`` as a path from the home folder; lists entry by entry; anything else as it is."""
    if isinstance(value, list):
        return [expand_home(v) for v in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def as_utf8(text: str) -> str:
    """Text of a command line; bytes that the locale could not read are read as UTF-8. Raises UserError where they are not."""
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise UserError(f"{text[:40]!r} is not UTF-8: write it as UTF-8, or set the locale it is written in") from None


def slug(text: str) -> str:
    """A file name for a spec, of at most 109 characters, with a hash where characters were cut or replaced."""
    plain = re.sub(r"[^A-Za-z0-9.+=-]+", "_", text).strip("_")[:100]
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    return plain if plain == text else f"{plain}-{digest[:8]}"
