"""Checkpoints of a run: which there are, and whether each is as it was saved."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from unmask.errors import UserError
from unmask.io.files import read_json, write_json

CHECKSUMS = "checksums.json"
"""Written last: a checkpoint without it was cut off."""


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run folder, by their number of updates; a copy under another name is none."""
    found = {p: re.fullmatch(r"checkpoint-(\d+)", p.name) for p in output.glob("checkpoint-*")}
    numbers = {p: int(name[1]) for p, name in found.items() if name and (p / CHECKSUMS).is_file()}
    return sorted(numbers, key=lambda p: numbers[p])


def seal(folder: Path) -> None:
    """Write the checksum of every file of a finished checkpoint."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != CHECKSUMS]
    write_json(folder / CHECKSUMS, {str(p.relative_to(folder)): _checksum(p) for p in files})


def verify(folder: Path) -> None:
    """Raises UserError for the first file of a checkpoint that is not as it was saved; nothing in it is executed."""
    fix = f"remove {folder}, and the same command resumes from the checkpoint before it, or from the start"
    for name, checksum in read_json(folder / CHECKSUMS, {...: str}, fix).items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise UserError(f"{folder / name} is damaged or missing: {fix}")


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
