"""What makes a run resumable: a folder that belongs to its settings, and records as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.io.files import atomic_write, each_line, read_json, write_json

Record = dict[str, Any]
FORMAT = 1
"""Version of what run folders hold, raised where equal settings no longer mean equal results; others are refused."""


def claim(
    folder: Path, settings: dict[str, Any], may_change: Collection[str] = (), may_grow: Collection[str] = ()
) -> None:
    """Make a folder this run's: write ``config.json``, or refuse a folder that holds something else with a UserError.

    Args:
        settings: all that decides the results as JSON values, defaults included, so a default that changes is a difference.
        may_change: keys in which a later call may differ.
        may_grow: keys of tables that later calls may add to, and of numbers that they may raise (None: no limit).
    """
    path = folder / "config.json"
    now = json.loads(json.dumps({"format": FORMAT, **settings}))
    if path.exists():
        before = read_json(path, dict, "choose another --output")
        changed = {k for k in {*before, *now} - {*may_change} if before.get(k, ...) != now.get(k, ...)}
        for key in changed & {*may_grow}:
            if _grows(before.get(key), now[key]):
                changed.remove(key)
                now[key] = {**before[key], **now[key]} if isinstance(now[key], dict) else now[key]
        if changed:
            raise UserError(f"{folder} holds results with other {', '.join(sorted(changed))}: choose another --output")
    elif found := next(folder.rglob("*.jsonl*"), None):
        raise UserError(f"{found} lacks the config.json that says what it belongs to: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def _grows(before: Any, now: Any) -> bool:
    if isinstance(before, dict) and isinstance(now, dict):
        return all(before[key] == now[key] for key in before.keys() & now.keys())
    return type(before) is int and before > 0 and (now is None or (type(now) is int and before < now))


def shard(path: Path, rank: int) -> Path:
    """The file that one of several processes appends to instead of ``path``."""
    return path.with_name(f"{path.name}.rank-{rank}")


def as_lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


@dataclass(frozen=True)
class RecordStore:
    """A file of JSON lines, each the record of one ``key``: what is there is read, what is new is appended.

    Several processes append to a shard each; ``merge`` takes all shards, of any number of processes, into the file, which is
    complete before a shard is removed: a crash neither loses nor doubles a record. A last line that was cut off is dropped.

    Attributes:
        schema: of a line, as in ``schema.py``.
        fix: what to do about a damaged line: the end of the message.
        check: raises ValueError where a record does not belong here.
    """

    path: Path
    schema: Any
    key: Callable[[Record], Any]
    fix: str
    check: Callable[[Record], Any] = lambda record: None

    def merge(self, world: int = 0) -> dict[Any, Record]:
        """All records by key, in order; the file then holds them, and there are no shards. UserError changes no file.

        Shards of ranks below ``world`` are looked for by name, since a network file system may list late.
        """
        listed = {*self.path.parent.glob(f"{self.path.name}.rank-*"), *(shard(self.path, r) for r in range(world))}
        shards = sorted(p for p in listed if p.exists())
        records: dict[Any, Record] = {}
        for part in (self.path, *shards):
            for _, key, record in each_line(part, self.schema, self.fix, lambda r: (self.check(r), self.key(r), r)):
                records.setdefault(key, record)
        records = dict(sorted(records.items()))
        if records or shards:
            with atomic_write(self.path) as partial:
                partial.write_text(as_lines(records.values()), encoding="utf-8")
        for part in shards:
            part.unlink()
        return records

    def append(self, records: Iterable[Record], rank: int | None = None) -> None:
        """Write records at once: to the file (after ``merge``), or to a process's shard."""
        with (self.path if rank is None else shard(self.path, rank)).open("a", encoding="utf-8") as file:
            file.write(as_lines(records))
