"""Rows of data sets, from the hub or from local files, with the place of each for messages."""

from __future__ import annotations

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

    ``datasets`` retries for half a minute without a network; here one request decides beforehand. Where the hub cannot be
    reached, what was loaded once is found in the local cache.

    Raises:
        UserError: one sentence that names the data set and what to give ``instead``; also while the rows are read.
    """
    name = expand_home(name)
    suffix = Path(name).suffix.lower()
    if os.path.isfile(name):
        if suffix not in SUFFIXES:
            raise UserError(f"{name} is no data file that can be read: give {', '.join(SUFFIXES)} or a folder of them")
        return read_rows(name)
    if os.path.isdir(name):
        files = _files_of(name, split, configuration, instead)
        return (row for file in files for row in read_rows(file))
    if suffix in SUFFIXES or name.startswith(("/", ".")):
        raise UserError(f"there is no file {name}: give {instead}, or the name of a data set on the hub")
    rows = enumerate(_from_hub(name, split, configuration, instead), 1)
    return ((f"{name} ({split}), row {number}", row) for number, row in rows)


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file with their places: of a .parquet file, else JSON objects, one a line or in one list.

    Nothing is converted: text that looks like a date stays text, and columns may hold values of several types.

    Raises:
        UserError: for a file without rows, or naming the first place that cannot be read.
    """
    found: Iterable[tuple[str, Any]]
    if path.lower().endswith(".parquet"):
        found = ((f"{path}, row {number}", row) for number, row in enumerate(_read_parquet(path), 1))
    elif (text := read_text(path)).lstrip().startswith("["):
        found = ((f"{path}, row {number}", row) for number, row in enumerate(_parse(text, path), 1))
    else:
        lines = ((f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1))
        found = ((place, _parse(line, place)) for place, line in lines if line.strip())
    empty = True
    for place, row in found:
        empty = False
        if not isinstance(row, dict):
            raise UserError(f"{place} is {row!r:.60}: write a JSON object there")
        yield place, row
    if empty:
        raise UserError(f"the data file {path} holds no rows: choose one that does")


def _parse(text: str, place: str) -> Any:
    """The JSON value of a text. Raises UserError where it is none, or holds half of a character."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(f"{place} holds half of a character ({half}): write both halves or remove it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}): write an object a line, or a list of objects") from None
    return value


def _read_parquet(path: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with open(path, "rb") as file:  # a name would be searched for columns (a=1/x.parquet)
            for batch in parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"cannot read the data file {path} ({reason}): repair it or fetch it again") from None


def _files_of(folder: str, split: str, configuration: str | None, instead: str) -> list[str]:
    """The files of a split: those that the folder's README.md names, else those whose names tell it."""
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    base = glob.escape(os.path.abspath(folder))
    card = os.path.join(folder, "README.md")
    try:
        data = DatasetCard(read_text(card)).data if os.path.isfile(card) else None
        configs = MetadataConfigs() if data is None else MetadataConfigs.from_dataset_card_data(data)
        chosen = configs.get(configuration or configs.get_default_config_name() or next(iter(configs), ""), {})
        patterns = sanitize_patterns(chosen["data_files"]) if "data_files" in chosen else get_data_patterns(base)
        wanted = {split: patterns[split]}
        return [*DataFilesDict.from_patterns(wanted, base, allowed_extensions=list(SUFFIXES))[split]]
    except (FileNotFoundError, KeyError):
        raise UserError(f"{folder} has no {', '.join(SUFFIXES)} file of the {split} split: give {instead}") from None
    except (OSError, ValueError, TypeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"cannot read the {split} split of {folder} ({reason}): give {instead}") from None


def _from_hub(name: str, split: str, configuration: str | None, instead: str) -> Any:
    """A split as a ``datasets.Dataset``."""
    import datasets
    import huggingface_hub

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it would say stands in the sentence
    was = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if not _reachable(name):
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # noqa: BLE001  (hub, network, cache and readers raise each their own)
        cause = error.__cause__ or error
        reason = (str(cause).strip() or repr(cause)).splitlines()[0]
        raise UserError(f"the data set {name} cannot be had from the hub ({reason}): give {instead}") from None
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = was
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _reachable(name: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise
    except Exception:  # noqa: BLE001  (no network, no access: the cache decides)
        return False
    return True
