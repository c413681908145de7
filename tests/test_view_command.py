"""``unmask view``: prompts, problems and records come out as other commands decode them; mistakes are one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from browser import data_of
from unmask.errors import UserError
from unmask.evaluation.evaluate import EvalConfig, evaluate
from unmask.view.command import command
from unmask.view.config import ViewArguments
from unmask.view.jobs import source_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation."""
    output = tmp_path_factory.mktemp("view") / "run"
    decoders = ["semi-ar:steps=12", "full-random:steps=8"]
    settings = {"decoder": decoders, "limit": 3, "seed": 1, "max_new_tokens": 96, "early_stop": False}
    evaluate(EvalConfig(**settings, output=str(output)))  # type: ignore[arg-type]
    return output


def records_of(run: Path, decoder: str, task: str = "countdown") -> Path:
    return next((run / "records").glob(f"{task}--{decoder}*.jsonl"))


def viewed(output: Path) -> dict[str, Any]:
    return data_of(output.read_text())


def test_records_are_decoded_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, output = [records_of(run, "semi-ar"), records_of(run, "full-random")], tmp_path / "page.html"
    command([*map(str, files), "--index", "2", "--output", str(output)])
    data = viewed(output)
    for panel, file in zip(data["panels"], files, strict=True):
        record = next(r for r in map(json.loads, file.read_text().splitlines()) if r["index"] == 2)
        assert panel["text"] == panel["recorded"] == record["completion"]
        assert (panel["nfe"], panel["solved"], data["prompt"]) == (record["nfe"], record["solved"], record["prompt"])
        assert sum(s >= 0 for s in panel["step"]) == record["committed"] == 96
    said = capsys.readouterr()
    assert said.out == f"page  {output}  ({output.stat().st_size / 1e6:.2f} MB)\n" and said.err == ""
    task = ["--task", "countdown", "--index", "2", "--seed", "1", "--max-new-tokens", "96", "--output", str(output)]
    command([*task, "--no-early-stop", "--decoder", "semi-ar:steps=12", "full-random:steps=8"])
    again = viewed(output)["panels"]
    assert [{**p, "recorded": None} for p in data["panels"]] == again


def test_the_model_is_the_records_own_where_no_other_is_named() -> None:
    config = {"model": {"name": "base + lora", "dtype": "bfloat16"}, "adapter": "lora", "revision": "main"}
    config["load_in_4bit"] = True
    own = source_of(config, ViewArguments())
    assert (own.model, own.adapter, own.revision, own.dtype) == ("base", "lora", "main", "bfloat16")
    assert own.load_in_4bit and not own.trust_remote_code
    other = source_of(config, ViewArguments(model="there", dtype="float32"))
    assert (other.model, other.adapter, other.revision, other.dtype) == ("there", None, None, "float32")
    assert not other.load_in_4bit and source_of(config, ViewArguments(adapter="mine")).adapter == "mine"


def test_a_text_that_differs_from_the_record_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run" / "records"
    other.mkdir(parents=True)
    (other.parent / "config.json").write_text((run / "config.json").read_text())
    file = other / records_of(run, "semi-ar").name
    rows = [json.loads(line) for line in records_of(run, "semi-ar").read_text().splitlines()]
    file.write_text("".join(json.dumps({**r, "completion": "something else"}) + "\n" for r in rows))
    command([str(file), "--output", str(tmp_path / "page.html")])
    (panel,) = viewed(tmp_path / "page.html")["panels"]
    assert panel["recorded"] == "something else" != panel["text"] and panel["solved"] is None
    assert "semi-ar:steps=12 writes another text now" in capsys.readouterr().out


def test_a_prompt_gives_what_generate_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from unmask.evaluation.generate import command as generate

    same = ["make 29 from 3 8 5", "--decoder", "full:steps=8,temperature=1", "--seed", "3", "--max-new-tokens", "32"]
    command([*same, "--prefill", "<reasoning>3", "--output", str(tmp_path / "page.html")])
    capsys.readouterr()
    generate([*same, "--prefill", "<reasoning>3"])
    data = viewed(tmp_path / "page.html")
    assert data["panels"][0]["text"] == capsys.readouterr().out.removesuffix("\n")
    assert data["prompt"] == "<|user|>make 29 from 3 8 5<|assistant|><reasoning>3"


def test_a_name_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text('name: "[/bold] x"\n')
    command(["x", "--decoder", str(tmp_path / "x.yaml"), "--max-new-tokens", "8", "--output", str(tmp_path / "p.html")])
    assert viewed(tmp_path / "p.html")["panels"][0]["decoder"] == "[/bold] x" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "0 prompts: use one text"),
        (["nothing.jsonl"], "nothing.jsonl is in no run's records: use RUN/records/"),
        (["RUN"], "is no records file: use RUN/records/TASK--DECODER.jsonl of unmask eval, or one text"),
        (["RECORDS", "text"], "text is no records file"),
        (["RECORDS"] * 5, "5 records files: a page shows one to 4"),
        (["a", "--decoder", "asss"], "did you mean 'ass'"),
        (["a", "--index", "1"], "index is 1, but a prompt has no others: leave it out"),
        (["a", "--task", "sudoku"], "prompt is ['a'], but the task decides that"),
        (["a", "--candidates", "0"], "candidates is 0: choose 1 to 20"),
        (["a", "--model", "nowhere", "--output", "/proc/nothing/x.html"], "cannot write to /proc/nothing/x.html"),
        (["a", "--max-new-tokens", "4000"], "at most 2048 together"),
        (["RECORDS", "--decoder", "full"], "decoder is ['full'], but the records decide that: leave it out"),
        (["RECORDS", "--index", "3"], "no record of problem 3 (it has 3)"),
        (["RECORDS", "SUDOKU"], "hold different prompts at index 0"),
        (["RECORDS", "--model", "TOY"], "but toy has"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Path, toy_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy").symlink_to(toy_folder)
    files = [str(records_of(run, "semi-ar", task)) for task in ("countdown", "sudoku")]
    names = {"RUN": str(run), "RECORDS": files[0], "SUDOKU": files[1], "TOY": "toy"}
    with pytest.raises(UserError) as error:
        command([names.get(a, a) for a in arguments])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("config", "records", "said"),
    [
        (None, "", "is in no run's records: use RUN/records/"),
        ('{"model": {}, "tasks": {}, "decoders": {}}', "", "it lacks 'seed'"),
        ("same", "{", "holds no record of problem 0 (it has 0)"),
    ],
)
def test_damaged_runs(run: Path, tmp_path: Path, config: str | None, records: str, said: str) -> None:
    file = tmp_path / "records" / records_of(run, "semi-ar").name
    file.parent.mkdir()
    file.write_text(records)
    if config is not None:
        (tmp_path / "config.json").write_text((run / "config.json").read_text() if config == "same" else config)
    with pytest.raises(UserError, match=r"evaluate again|choose another|use RUN/records/") as error:
        command([str(file), "--output", str(tmp_path / "page.html")])
    assert said in str(error.value) and "\n" not in str(error.value)
