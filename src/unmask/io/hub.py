"""Rows of data sets, from the hub or from local files, with the place of each for messages."""

from __future__ import annotations

import csv
import glob
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.io.files import expand_home, read_text

SUFFIXES = (".json", ".jsonl", ".parquet")
Rows = Iterable[tuple[str, dict[str, Any]]]
"""Where a row stands, as ``FILE:LINE`` or ``FILE, row N``, and the row."""


def load_split(name: str, split: str, configuration: str | None = None, instead: str = "a local path") -> Rows:
    """The rows of a split: of a local file (whatever the split), of a local folder as the hub lays it out, or of the hub.

    Raises:
        UserError: one sentence that names the data set and what to use ``instead``; also while the rows are read.
    """
    name = expand_home(name)
    suffix = Path(name).suffix.lower()
    if os.path.isfile(name):
        if suffix not in SUFFIXES:
            raise UserError(f"unsupported data file {name}: choose {', '.join(SUFFIXES)} or a folder of them")
        return read_rows(name)
    if os.path.isdir(name):
        return (row for file in _split_files(name, split, configuration, instead) for row in read_rows(file))
    if suffix in SUFFIXES or name.startswith(("/", ".")):
        raise UserError(f"there is no file {name}: use {instead}, or the name of a data set on the hub")
    return _numbered(_from_hub(name, split, configuration, instead), f"{name} ({split})")


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file with their places: of a .parquet or .csv file, else JSON objects, one a line or in one list.

    Nothing is converted: text that looks like a date stays text, and columns may hold values of several types.

    Raises:
        UserError: for a file without rows, or naming the first place that cannot be read.
    """
    place = ""
    for place, row in _places(path):
        if not isinstance(row, dict):
            raise UserError(f"{place} is {row!r:.60}: write a JSON object there")
        yield place, row
    if not place:
        raise UserError(f"the data file {path} holds no rows: choose one that does")


def _places(path: str) -> Iterator[tuple[str, Any]]:
    try:
        if path.lower().endswith(".parquet"):
            from pyarrow.parquet import ParquetFile

            with open(path, "rb") as file:  # a name would be searched for columns (a=1/x.parquet)
                batches = ParquetFile(file).iter_batches()
                yield from _numbered((row for batch in batches for row in batch.to_pylist()), path)
            return
        text = read_text(path)
        if path.lower().endswith(".csv"):
            yield from _numbered(csv.DictReader(text.splitlines()), path)
            return
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (each reader raises its own)
        raise _failure(f"cannot read the data file {path}", error, "repair it or fetch it again") from None
    if text.lstrip().startswith("["):
        yield from _numbered(_parse(text, path), path)
    else:
        lines = ((f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1))
        yield from ((place, _parse(line, place)) for place, line in lines if line.strip())


def _numbered(rows: Iterable[Any], source: str) -> Iterator[tuple[str, Any]]:
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, 1))


def _parse(text: str, place: str) -> Any:
    """The JSON value of a text. Raises UserError where it is none, or holds half of a character."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}): write an object a line, or a list of objects") from None
    return value


def _split_files(folder: str, split: str, configuration: str | None, instead: str) -> list[str]:
    """The files of a split: those that the folder's README.md names, else those whose names tell it."""
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    base = glob.escape(os.path.abspath(folder))
    card = Path(folder, "README.md")
    try:
        text = read_text(card) if card.is_file() else ""
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard(text).data)
        chosen = configs.get(configuration or configs.get_default_config_name() or next(iter(configs), ""), {})
        patterns = sanitize_patterns(chosen["data_files"]) if "data_files" in chosen else get_data_patterns(base)
        wanted = {split: patterns[split]}
        return [*DataFilesDict.from_patterns(wanted, base, allowed_extensions=list(SUFFIXES))[split]]
    except (FileNotFoundError, KeyError):
        raise UserError(f"{folder} has no {', '.join(SUFFIXES)} file of the {split} split: use {instead}") from None
    except (OSError, ValueError, TypeError) as error:
        raise _failure(f"cannot read the {split} split of {folder}", error, f"use {instead}") from None


def _failure(what: str, error: BaseException, fix: str) -> UserError:
    """The error for what a library stumbles over, with the first line of what it says."""
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return UserError(f"{what} ({reason}): {fix}")


def _from_hub(name: str, split: str, configuration: str | None, instead: str) -> Any:
    """A split as a ``datasets.Dataset``; where the hub cannot be reached, what was loaded once comes from the cache."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it would say stands in the sentence
    was = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=10)
        except RepositoryNotFoundError:
            raise
        except Exception:  # noqa: BLE001  (no network, no access: the cache decides, without half a minute of retries)
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # noqa: BLE001  (hub, network, cache and readers raise each their own)
        raise _failure(f"could not download the data set {name}", error.__cause__ or error, f"use {instead}") from None
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = was
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
