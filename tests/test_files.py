"""Files of this program and of its users: what is read is checked where it is read, and one sentence names the place."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import report_folders
from unmask import Trajectory, make_decoder
from unmask.cli import grade_file, main
from unmask.errors import UserError
from unmask.evaluation.config import TuneConfig
from unmask.evaluation.evaluate import EvalConfig, evaluate, prepare
from unmask.evaluation.tune import Trials
from unmask.io.files import as_yaml, read_yaml
from unmask.io.schema import MEASURED
from unmask.results.collect import collect
from unmask.results.summary import run_lines
from unmask.tasks import make_task
from unmask.view.config import ViewArguments
from unmask.view.jobs import from_records

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
STRANGE_YAML = {
    "date tag": "steps: !!timestamp 2024-13-45\n",
    "alias bomb": BOMB,
    "merge bomb": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
    "alias to itself": "steps: &a [*a]\n",
    "tab": "steps:\n\t- 1\n",
    "key twice": "steps: 1\nsteps: 2\n",
    "number as key": "1: 2\n",
    "list as key": "? [a]\n: 1\n",
    "long key twice": f"? {'k' * 9_999}\n? {'k' * 9_999}\n",
    "long alias": "steps: *" + "k" * 9_999 + "\n",
    "long tag": "steps: !" + "k" * 9_999 + " 1\n",
    "python object": "steps: !!python/object/apply:os.system [touch executed]\n",
    "binary": "steps: !!binary aGVsbG8=\n",
    "set": "steps: !!set {a, b}\n",
    "int tag": "steps: !!int seven\n",
    "own tag": "steps: !mine 7\n",
    "deep": "steps: " + "[" * 1_000,
    "40 levels": "steps: " + "[" * 40 + "]" * 40 + "\n",
    "digits": "steps: " + "9" * 5_000 + "\n",
    "empty": "",
    "list": "- steps\n",
    "text": "steps\n",
    "two documents": "steps: 1\n---\nsteps: 2\n",
    "zero byte": "steps: \0\n",
    "unknown alias": "steps: *nowhere\n",
    "bracket": "steps: [1\n",
}


@pytest.mark.parametrize("text", STRANGE_YAML.values(), ids=STRANGE_YAML)
@pytest.mark.parametrize("command", [["generate", "x", "--decoder"], ["study"]])
def test_strange_yaml_is_one_sentence(
    command: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("strange.yaml").write_text(text)
    assert main([*command, "strange.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "strange.yaml" in said and len(said) < 300
    assert [p.name for p in tmp_path.iterdir()] == ["strange.yaml"]


def test_a_yaml_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(UserError, match="cannot read the decoder file"):
        make_decoder(str(path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("3", 3),
        ("1_000", 1000),
        (".inf", math.inf),
        ("2024-12-31", "2024-12-31"),
        ("2024-13-45", "2024-13-45"),
        ("12:30", "12:30"),
        ("=", "="),
        ("1e", "1e"),
        ("'1e-5'", "1e-5"),
        ("true", True),
        ("~", None),
    ],
)
def test_yaml_values(text: str, value: Any, tmp_path: Path) -> None:
    """Numbers as in YAML 1.2; dates and times stay text; also in nested tables, and behind a byte-order mark."""
    (tmp_path / "x.yaml").write_text(f"a: {text}\nb: {{c: [{text}]}}\n", encoding="utf-8-sig")
    found = read_yaml(tmp_path / "x.yaml", "the file")
    assert found == {"a": value, "b": {"c": [value]}} and type(found["a"]) is type(value)


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.from_regex(r"[-0-9.e:_]+")
)


@settings(max_examples=50, deadline=None)
@given(
    value=st.dictionaries(
        st.text(), st.recursive(PLAIN, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)
    )
)
def test_yaml_that_is_written_is_read_back(value: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(as_yaml(value), encoding="utf-8")
    found = read_yaml(path, "the file")
    assert found == value and repr(found) == repr(value)


# ---- what runs have written, read back -------------------------------------------------------------------------------------

DELETED = object()
WRONG: list[Any] = [
    *("<script>alert(1)</script>", "\ud800", None, [1, ["x"]], {"a": 1}, True, math.nan, 10**400, -7),
    functools.reduce(lambda inner, _: [inner], range(900), 1),
    DELETED,
]
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
            assert re.search(r"[:;] (remove|give|choose|write|run|evaluate|let) ", said)
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
    run, study = report_folders.run(at / "run", 0), report_folders.study(at / "study")
    limits = {"limit": 1, "run_off_limit": 2, "test_limit": 1}
    tuned = TuneConfig(model=model, task="countdown", budget=4, max_new_tokens=16, **limits, output=str(at))
    trials = Trials(tuned, ["ass"])
    measured = {key: value for key, value in report_folders.records(1, 1, 4)[0].items() if key in MEASURED}
    measured |= {"split": "validation", "decoder": "ass", "id": trials.cells["validation", "ass"].problems[0].id}
    trials.store.append([measured])
    completions = at / "completions.jsonl"
    completions.write_text(json.dumps({"completion": "8*3+5", "ground_truth": [[8, 3, 5], 29]}) + "\n")

    def go_on() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("unmask.evaluation.evaluate.prepare", lambda _: prepared)
            evaluate(config)

    def report_of(folder: Path) -> Callable[[], Any]:
        return lambda: collect([folder])

    def view() -> None:
        from_records(ViewArguments(prompt=[str(records)]))

    records = cell.store.path
    counts = ("index", "points", "possible", "nfe", "committed", "length", "seconds")
    return {
        "records": Store(records, cell.store.merge, counts),
        "config.json": Store(at / "eval" / "config.json", go_on, ("limit", "max_new_tokens")),
        "summary.json": Store(at / "eval" / "summary.json", report_of(at / "eval")),
        "records in a page": Store(records, view, counts),
        "config.json in a page": Store(at / "eval" / "config.json", view, ("seed",)),
        "measurements": Store(trials.store.path, trials.store.merge, counts),
        "metrics": Store(run / "metrics.jsonl", report_of(run), ("step",)),
        "times": Store(run / "times.jsonl", report_of(run), ("step",)),
        "cells": Store(study / "cells.jsonl", report_of(study), ("seconds",)),
        "runs": Store(study / "runs.jsonl", lambda: run_lines(study / "runs.jsonl")),
        "completions": Store(completions, lambda: grade_file(make_task("countdown", {}), str(completions))),
    }


STORES = (
    *("records", "config.json", "summary.json", "records in a page", "config.json in a page", "measurements"),
    *("metrics", "times", "cells", "runs", "completions"),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of the values in a value; of a list those of its first entry."""
    for key in value if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(value[key], (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> bytes:
    """A copy with another value at a place, as JSON."""
    value = copy.deepcopy(value)
    box = functools.reduce(lambda inner, key: inner[key], at[:-1], value)
    box[at[-1]] = new
    if new is DELETED:
        del box[at[-1]]
    return json.dumps(value).encode()


@pytest.mark.parametrize("store", STORES)
def test_a_wrong_value_anywhere_is_one_sentence(stores: dict[str, Store], store: str) -> None:
    """No value at any place ends in anything but a result or a sentence; for numbers it is a sentence that says where."""
    found = stores[store]
    value, rest = found.lines()
    assert found.says(found.path.read_bytes()) == ""
    for wrong in WRONG:
        for at in places(value):
            said = found.says(changed(value, at, wrong) + b"\n" + rest)
            if at in [(key,) for key in found.numbers]:
                assert said, f"{wrong!r} was taken for {at[0]}"


@pytest.mark.parametrize("store", STORES)
def test_a_bad_line_is_named(stores: dict[str, Store], store: str) -> None:
    found = stores[store]
    _, rest = found.lines()
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


@pytest.mark.parametrize("store", STORES)
def test_a_folder_in_a_files_place_is_named(stores: dict[str, Store], store: str) -> None:
    found = stores[store]
    aside = found.path.rename(found.path.with_name("aside"))
    found.path.mkdir()
    try:
        with pytest.raises(UserError, match=r"Is a directory|holds no|is not finished|does not exist|is in no run"):
            found.read()
    finally:
        found.path.rmdir()
        aside.rename(found.path)


DAMAGED = {
    "deep": {"decoder": "[" * 9_999},
    "a list for the decoder": {"decoder": "[]"},
    "text for a number": {"decoder": '{"cfg_scale": "x"}'},
    "no decoder": {"decoder": None},
    "text for the mask": {"mask_id": "x"},
}


@pytest.mark.parametrize("wrong", [*DAMAGED.values(), {}], ids=[*DAMAGED, "a row too few"])
def test_a_damaged_trajectory_is_one_sentence(wrong: dict[str, Any], tmp_path: Path) -> None:
    whole = torch.zeros(2, 3, dtype=torch.int64)
    tensors = {"prompt": whole.clone(), "prompt_mask": whole == 0, "tokens": whole, "step": whole.short()}
    tensors["logprob"] = whole.float()
    Trajectory(**tensors, mask_id=0, decoder={"cfg_scale": 0.0}).save(tmp_path / "x")
    assert Trajectory.load(tmp_path / "x").steps == 1
    meta = {"mask_id": "0", "decoder": '{"cfg_scale": 0.0}', **wrong}
    if not wrong:
        tensors["step"] = tensors["step"][:1].clone()
    save_file(tensors, tmp_path / "x", metadata={k: v for k, v in meta.items() if v is not None})
    with pytest.raises(UserError, match=r"is not a saved trajectory .*: give a file"):
        Trajectory.load(tmp_path / "x")
