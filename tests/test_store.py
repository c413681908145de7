"""Folders that belong to their settings, and stores of records: nothing lost, nothing twice, nothing taken for another's."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from unmask import UserError
from unmask.decoding import PRESETS
from unmask.evaluation.evaluate import EvalConfig, evaluate
from unmask.io import store as module
from unmask.io.files import read_lines
from unmask.io.schema import COUNT
from unmask.io.store import Record, RecordStore, as_lines, claim, shard


def test_a_folder_belongs_to_its_settings(tmp_path: Path) -> None:
    def again(**changes: Any) -> dict[str, Any]:
        claim(tmp_path / "run", {**settings, **changes}, ["batch"], ["limit", "tasks"])
        return json.loads((tmp_path / "run" / "config.json").read_text())

    settings = {"seed": 0, "pair": (1, 2), "batch": 4, "limit": 8, "tasks": {"a": {"x": 1}}}
    assert again() == again() == {"format": module.FORMAT, **settings, "pair": [1, 2]}
    for change in ({"seed": 1}, {"pair": (1, 3), "seed": 1}, {"new": None}, {"limit": 7}, {"tasks": {"a": {"x": 2}}}):
        with pytest.raises(UserError, match=f"holds results with other {', '.join(change)}: choose another --output"):
            again(**change)
    assert again(batch=7, limit=9, tasks={"b": {}})["tasks"] == {"a": {"x": 1}, "b": {}}
    assert again(limit=None)["limit"] is None
    with pytest.raises(UserError, match="other limit"):
        again(limit=100)


def test_a_folder_of_unknown_origin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path / "old", {"seed": 0})
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    with pytest.raises(UserError, match="other format"):
        claim(tmp_path / "old", {"seed": 0})
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.jsonl.rank-0").touch()
    with pytest.raises(UserError, match=r"rank-0 lacks the config\.json .*: choose another --output"):
        claim(tmp_path, {"seed": 0})


def test_a_default_that_changes_accepts_no_old_record(model: str, tmp_path: Path) -> None:
    def run() -> None:
        few: dict[str, Any] = {"task": ["countdown"], "decoder": ["eoser"], "limit": 1, "max_new_tokens": 16}
        evaluate(EvalConfig(model=model, output=str(tmp_path), **few))

    run()
    of_eval: Any = EvalConfig.__init__.__kwdefaults__
    for defaults, name, says in ((PRESETS["eoser"], "gamma_min", "decoders"), (of_eval, "early_stop", "early_stop")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(defaults, name, 0)
            with pytest.raises(UserError, match=f"other {says}: choose another --output"):
                run()


def check(record: Record) -> None:
    if record["index"] > 8:
        raise ValueError(f"index {record['index']}")


def a_store(folder: Path) -> RecordStore:
    return RecordStore(folder / "cell.jsonl", {"index": COUNT}, itemgetter("index"), "remove it", check)


def rows(*indexes: int, **more: str) -> list[Record]:
    return [{"index": i, **more} for i in indexes]


def test_what_is_appended_is_there_and_a_line_that_was_cut_off_is_not(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert store.merge() == {} and not store.path.exists()
    store.append(rows(3, 1))
    with store.path.open("a") as file:
        file.write('{"index": 2, "na')
    assert list(a_store(tmp_path).merge()) == [1, 3]
    store.append(rows(2))
    assert a_store(tmp_path).merge() == {1: {"index": 1}, 2: {"index": 2}, 3: {"index": 3}}


def test_shards_of_any_number_of_processes_merge(tmp_path: Path) -> None:
    """Also those of a merge that a crash cut off, with a line that another crash cut off; nothing twice, nothing lost."""
    store = a_store(tmp_path)
    path = store.path
    for rank, indexes in ((None, [5, 1]), (0, [6, 0]), (1, [5, 7]), (12, [8])):  # 5 was merged already
        store.append(rows(*indexes, by=str(rank)), rank)
    with shard(path, 12).open("a") as file:
        file.write('{"index": 2, "by": "1')
    (tmp_path / "cell.jsonl-other.jsonl.rank-0").write_text(as_lines(rows(4)))
    assert list(store.merge(1)) == [0, 1, 5, 6, 7, 8]
    by = [(r["index"], r["by"]) for r in read_lines(path)]
    assert by == [(0, "0"), (1, "None"), (5, "None"), (6, "0"), (7, "1"), (8, "12")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cell.jsonl", "cell.jsonl-other.jsonl.rank-0"]


@pytest.mark.parametrize("line", ['{"index": 9}', "[]"])
def test_a_wrong_record_leaves_everything_as_it_is(line: str, tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.append(rows(1))
    shard(store.path, 2).write_text(line + "\n")
    before = store.path.read_bytes()
    with pytest.raises(UserError, match=r"rank-2:1 is damaged .*: remove it"):
        store.merge()
    assert store.path.read_bytes() == before and shard(store.path, 2).exists()


def test_a_merge_that_cannot_write_keeps_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_store(tmp_path)
    store.append(rows(1), 0)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("unmask.io.files.os.replace", Mock(side_effect=OSError("disk full")))
        store.merge()
    assert [p.name for p in tmp_path.iterdir()] == ["cell.jsonl.rank-0"]
    assert store.merge() == {1: {"index": 1}} and [p.name for p in tmp_path.iterdir()] == ["cell.jsonl"]
