"""What runs have written is checked where it is read again, and one sentence names the place."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest

import report_folders
from benchmarks.report.collect import collect
from unmask.cli import grade
from unmask.errors import UserError
from unmask.evaluation.config import TuneConfig
from unmask.evaluation.evaluate import EvalConfig, evaluate, prepare
from unmask.evaluation.tune import Trials
from unmask.io.schema import MEASURED
from unmask.view.config import ViewArguments
from unmask.view.jobs import from_records

DELETED = object()
WRONG = ("<script>alert(1)</script>", "\ud800", None, [1, ["x"]], {"a": 1}, True, math.nan, 10**400, -7, DELETED)
BAD = [b"[]", b'"x"', b"{", b"\xff", b"\0", b"NaN", b"[" * 100_000, b'{"index": ' + b"9" * 5_000 + b"}"]


@dataclass
class Store:
    """A file that is read back, what reads it, and keys of its first line (or of the whole) that hold numbers."""

    path: Path
    read: Callable[[], Any]
    numbers: tuple[str, ...] = ()

    def says(self, raw: bytes) -> str:
        """What reading other bytes says; empty where they are read."""
        before = self.path.read_bytes()
        self.path.write_bytes(raw)
        try:
            self.read()
        except UserError as error:
            said = str(error)
            assert str(self.path.parent) in said and "\n" not in said and len(said) < 600
            assert re.search(r"[:;] (remove|give|choose|write|run|evaluate|let|use) ", said)
            return said
        finally:
            self.path.write_bytes(before)
        return ""

    def lines(self) -> tuple[Any, bytes]:
        """The first line (or the whole) as a value, and the others."""
        raw = self.path.read_bytes()
        first, rest = (raw, b"") if self.path.suffix == ".json" else raw.split(b"\n", 1)
        return json.loads(first), rest


@pytest.fixture(scope="module")
def stores(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """A file of every kind, as a run leaves it."""
    at = tmp_path_factory.mktemp("stores")
    few: dict[str, Any] = {"task": ["countdown"], "decoder": ["ass"], "limit": 2, "max_new_tokens": 16}
    config = EvalConfig(model=model, **few, trajectories=True, output=f"{at}/eval")
    evaluate(config)
    prepared = prepare(config)
    (cell,) = prepared.cells
    run = report_folders.run(at / "run", 0)
    limits = {"limit": 1, "run_off_limit": 2, "test_limit": 1}
    tuned = TuneConfig(model=model, task="countdown", budget=4, max_new_tokens=16, **limits, output=str(at))
    trials = Trials(tuned, ["ass"])
    measured = {key: value for key, value in report_folders.records(1, 1, 4)[0].items() if key in MEASURED}
    measured |= {"split": "validation", "decoder": "ass", "id": trials.cells["validation", "ass"].problems[0].id}
    trials.store.append([measured])
    completions = at / "completions.jsonl"
    completions.write_text(json.dumps({"completion": "8*3+5", "ground_truth": [[8, 3, 5], 29]}) + "\n")

    def resume() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("unmask.evaluation.evaluate.prepare", lambda _: prepared)
            evaluate(config)

    records = cell.store.path
    view = partial(from_records, ViewArguments(prompt=[str(records)]))
    counts = ("index", "points", "possible", "nfe", "committed", "length", "seconds")
    return {
        "records": Store(records, cell.store.merge, counts),
        "config.json": Store(at / "eval" / "config.json", resume, ("limit", "max_new_tokens")),
        "summary.json": Store(at / "eval" / "summary.json", partial(collect, [at / "eval"])),
        "page_records": Store(records, view, counts),
        "page_config": Store(at / "eval" / "config.json", view, ("seed",)),
        "measurements": Store(trials.store.path, trials.store.merge, counts),
        "metrics": Store(run / "metrics.jsonl", partial(collect, [run]), ("step",)),
        "times": Store(run / "times.jsonl", partial(collect, [run]), ("step",)),
        "completions": Store(completions, partial(grade, [str(completions), "--task", "countdown"])),
    }


STORES = "records config.json summary.json page_records page_config measurements metrics times completions"


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of the values in a value; of a list those of its first entry."""
    for key in value if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(value[key], (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> bytes:
    """A copy with another value at a place, as JSON."""
    value = copy.deepcopy(value)
    box = reduce(lambda inner, key: inner[key], at[:-1], value)
    box[at[-1]] = new
    if new is DELETED:
        del box[at[-1]]
    return json.dumps(value).encode()


@pytest.mark.parametrize("store", STORES.split())
def test_wrong_values_and_bad_lines_are_one_sentence(stores: dict[str, Store], store: str) -> None:
    """Any value at any place is a result or a sentence; for numbers it is a sentence. A bad line is named."""
    found = stores[store]
    value, rest = found.lines()
    assert found.says(found.path.read_bytes()) == ""
    for wrong, at in itertools.product(WRONG, places(value)):
        said = found.says(changed(value, at, wrong) + b"\n" + rest)
        assert said or at not in [(key,) for key in found.numbers], f"{wrong!r} was taken for {at[0]}"

    for raw in BAD:
        if found.path.suffix == ".json":
            assert f"{found.path.name} is damaged (" in found.says(raw + b"\n")
            continue
        assert f"{found.path.name}:1 " in found.says(raw + b"\n" + rest)
        whole = found.path.read_bytes()
        number = whole.count(b"\n") + 1
        assert f"{found.path.name}:{number} " in found.says(whole + raw + b"\n")
        if store != "completions":  # a run's last line may not be whole yet
            assert found.says(whole + raw) == ""
