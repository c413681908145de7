"""Rows of data sets, from the hub or from local files, with the place of each for messages."""

from __future__ import annotations

import csv
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.io.files import expand_home, parse_json, read_text

SUFFIXES = (".json", ".jsonl", ".parquet")
Rows = Iterable[tuple[str, dict[str, Any]]]
"""The place of a row, as ``FILE:LINE`` or ``FILE, row N``, and the row."""


def load_split(name: str, split: str, configuration: str | None = None, instead: str = "a local path") -> Rows:
    """The rows of a split: of a local file (whatever the split), of a local folder as the hub lays it out, or of the hub.

    Raises UserError that names the data set and what to use ``instead``; also while the rows are read.
    """
    name = expand_home(name)
    if os.path.isfile(name):
        return read_rows(name)
    if os.path.isdir(name):
        return (row for file in _split_files(name, split, configuration, instead) for row in read_rows(file))
    if name.endswith(SUFFIXES) or name.startswith(("/", ".")):
        raise UserError(f"there is no file {name}: use {instead}, or the name of a data set on the hub")
    return _numbered(_from_hub(name, split, configuration, instead), f"{name} ({split})")


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file with their places: of a .parquet or .csv file, else JSON objects, one a line or in one list.

    Nothing is converted: text that looks like a date stays text, and columns may hold values of several types. Raises
    UserError for a file without rows, or naming the first place that cannot be read.
    """
    place = ""
    for place, row in _table_rows(path) if path.lower().endswith((".parquet", ".csv")) else _json_rows(path):
        yield place, row
    if not place:
        raise UserError(f"the data file {path} holds no rows: choose one that does")


def _table_rows(path: str) -> Rows:
    try:
        if path.lower().endswith(".csv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                yield from _numbered(csv.DictReader(file), path)
        else:
            from pyarrow.parquet import ParquetFile

            with open(path, "rb") as raw:  # a name would be searched for columns (a=1/x.parquet)
                batches = ParquetFile(raw).iter_batches()
                yield from _numbered((row for batch in batches for row in batch.to_pylist()), path)
    except Exception as error:  # noqa: BLE001  (each reader raises its own)
        raise _failure(f"cannot read the data file {path}", error, "repair it or fetch it again") from None


def _json_rows(path: str) -> Rows:
    text, fix = read_text(path), "write an object a line, or a list of objects"
    if text.lstrip().startswith("["):
        return _numbered(parse_json(text, [dict], f"{path} is not a list of JSON objects", fix), path)
    lines = ((f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return ((place, parse_json(line, dict, f"{place} is not a JSON object", fix)) for place, line in lines)


def _numbered(rows: Iterable[Any], source: str) -> Rows:
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, 1))


def _split_files(folder: str, split: str, configuration: str | None, instead: str) -> list[str]:
    """The files of a split: those that the folder's README.md names, else those whose names tell it."""
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    base, card = glob.escape(os.path.abspath(folder)), Path(folder, "README.md")
    try:
        data = DatasetCard(read_text(card) if card.is_file() else "").data
        configs = MetadataConfigs.from_dataset_card_data(data)
        chosen = configs.get(configuration or configs.get_default_config_name() or next(iter(configs), ""), {})
        patterns = sanitize_patterns(chosen["data_files"]) if "data_files" in chosen else get_data_patterns(base)
        wanted = {split: patterns[split]}
        return [*DataFilesDict.from_patterns(wanted, base, allowed_extensions=list(SUFFIXES))[split]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        wrong = f"{folder} has no {', '.join(SUFFIXES)} file of the {split} split"
        raise _failure(wrong, error, f"use {instead}") from None


def _failure(what: str, error: BaseException, fix: str) -> UserError:
    """The UserError for an exception of a library, with the first line of its message."""
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return UserError(f"{what} ({reason}): {fix}")


def _from_hub(name: str, split: str, configuration: str | None, instead: str) -> Any:
    """A split as a ``datasets.Dataset``, from the cache where the hub cannot be reached (at once with HF_HUB_OFFLINE=1)."""
    from datasets import load_dataset

    try:
        return load_dataset(name, configuration, split=split)
    except Exception as error:  # noqa: BLE001  (hub, network, cache and readers raise each their own)
        raise _failure(f"could not download the data set {name}", error.__cause__ or error, f"use {instead}") from None
