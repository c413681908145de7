"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from unmask.spec import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
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
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}; give another {instead}") from None


def claim_result(output: Path) -> None:
    """Try a result file before anything is measured for it; an earlier result stays until there is a new one.

    Raises UserError where it cannot be written.
    """
    with writing_to(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        there = output.exists()
        output.open("a").close()
        if not there:
            output.unlink()


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file of settings. Raises UserError, which calls the file ``what``, where it is none."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{what} {path} is not a table of settings: write lines of key: value")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line that is not (yet) whole is passed over. No file, no lines."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    return [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]
