"""Data sets, from the hub or from local files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from unmask.spec import UserError, expand_home

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_split(name: str, split: str, configuration: str | None = None, instead: str = "a local path") -> Any:
    """A split as a ``datasets.Dataset``: of a hub data set, a local file (whatever the split), or a local folder.

    ``datasets`` retries for half a minute without a network; here one request decides beforehand. Where the hub cannot be
    reached, what was loaded once is found in the local cache.

    Raises:
        UserError: one sentence that names the data set and what to give ``instead``.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it would say stands in the sentence
    name = expand_home(name)
    path = Path(name)
    if not path.exists() and (path.suffix in BUILDERS or name.startswith(("/", "."))):
        raise UserError(f"there is no file {name}: give {instead}, or the name of a data set on the hub")
    if path.is_file() and path.suffix not in BUILDERS:
        raise UserError(f"{name} is no data file that can be read: give {', '.join(BUILDERS)} or a folder of them")
    was = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if path.is_file():
            return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
        if not path.exists() and not _reachable(name):
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # noqa: BLE001  (hub, network, cache and readers raise each their own)
        cause = error.__cause__ or error
        reason = (str(cause).strip() or repr(cause)).splitlines()[0]
        if path.exists():
            raise UserError(
                f"cannot read the {split} split of {name} ({reason}): repair it, or give {instead}"
            ) from None
        raise UserError(f"the data set {name} cannot be had from the hub ({reason}): give {instead}") from None
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = was


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
