"""The search for a decoder on a toy model: resumed = uninterrupted, the file it writes, what it refuses."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unmask import UserError, make_decoder
from unmask.cli import main
from unmask.config import read_flags
from unmask.errors import TooFewProblems
from unmask.evaluation import evaluate as evaluation
from unmask.evaluation import tune as module
from unmask.evaluation import tune_report, tune_space
from unmask.evaluation.evaluate import EvalConfig, evaluate
from unmask.evaluation.progress import progress_bars
from unmask.evaluation.tune import Standing, pareto, tune
from unmask.evaluation.tune_command import command
from unmask.evaluation.tune_config import TuneConfig
from unmask.evaluation.tune_space import candidates
from unmask.results.statistics import paired_difference
from unmask.rl.config import DiffusionGRPOConfig
from unmask.tasks import Grade, Problem
from unmask.tasks.base import bucket
from unmask.tasks.countdown import Countdown

Result = dict[str, Any]


FINALISTS = module.FINALISTS


def some(*arguments: Any) -> tuple[list[str], list[str]]:
    presets, others = candidates(*arguments)
    return presets, others[::2]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Half of the candidates, four finalists; and since a random model solves nothing, grades by the hash of a text."""

    def grade(task: Countdown, problem: Problem, completion: str) -> Grade:
        return Grade(bucket(completion, 3) == 0, float(bucket(completion, 5)), 4.0, completion)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Countdown, "grade", grade)
        patch.setattr(tune_space, "candidates", some)
        patch.setattr(module, "FINALISTS", 4)
        patch.setattr(module, "FIRST_ROUND", 8)
        yield


def config(model: str, output: Path, **changes: object) -> TuneConfig:
    values = {
        "task": "countdown",
        "budget": 4,
        "limit": 18,
        "run_off_limit": 23,
        "test_limit": 12,
        "max_new_tokens": 16,
    }
    if "limit" in changes:
        values["run_off_limit"] = 1  # the last round's problems decide
    return TuneConfig(**{"model": model, "output": str(output), **values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def searched(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneConfig, Result]:
    chosen = config(model, tmp_path_factory.mktemp("search"))
    return chosen, tune(chosen)


def lines(output: str | Path) -> list[Result]:
    return [json.loads(line) for line in (Path(output) / "measurements.jsonl").read_text().splitlines()]


def measured(output: str | Path) -> dict[tuple[str, str], list[Result]]:
    """Records by split and decoder, in order of their index."""
    records: dict[tuple[str, str], list[Result]] = {}
    for line in lines(output):
        records.setdefault((line["split"], line["decoder"]), []).extend(line["records"])
    return {key: sorted(mine, key=lambda r: r["index"]) for key, mine in records.items()}


def lasting(value: Any) -> Any:
    """Without seconds and hardware."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if k not in ("seconds", "environment")}
    return [lasting(v) for v in value] if isinstance(value, list) else value


# ---- a search --------------------------------------------------------------------------------------------------------


def test_result_is_what_the_measurements_say(searched: tuple[TuneConfig, Result]) -> None:
    chosen, result = searched
    records = measured(chosen.output)
    found = {e["decoder"]: e for e in result["candidates"]}
    assert result["rounds"] == [8, 16, 18] and {e["problems"] for e in result["candidates"]} == {8, 16, 18}
    decided = {e["decoder"]: e for e in result["run_off"]}
    for name, entry in [*found.items(), *decided.items()]:
        all_of_it = records["validation", name]
        assert [r["index"] for r in all_of_it] == list(range((decided.get(name) or entry)["problems"]))
        mine = all_of_it[: entry["problems"]]
        assert entry["solved"] == sum(r["solved"] for r in mine) / len(mine)
        assert entry["nfe"] == sum(r["nfe"] for r in mine) / len(mine)
    last = [found[name] for name in result["finalists"]]
    assert all(e["problems"] == 18 and e["nfe"] <= chosen.budget for e in last)
    over = [e for e in found.values() if e["nfe"] > chosen.budget]
    assert over and not {e["decoder"] for e in over} & set(result["finalists"])
    assert result["front"] == [s.name for s in pareto([Standing(e["decoder"], e["solved"], e["nfe"]) for e in last])]
    assert set(decided) < set(result["finalists"]) and {e["problems"] for e in decided.values()} == {23}
    within = [e for e in decided.values() if e["nfe"] <= chosen.budget]
    assert len(within) >= 6 and result["winner"] == min(within, key=lambda e: (-e["solved"], e["nfe"]))
    assert result["best_preset"] == min((e for e in within if e["preset"]), key=lambda e: (-e["solved"], e["nfe"]))
    assert result["winner"]["solved"] != found[result["winner"]["decoder"]]["solved"]
    ours, theirs = (records["test", result[k]["decoder"]] for k in ("winner", "best_preset"))
    assert len(ours) == len(theirs) == 12
    assert {r["id"] for r in ours}.isdisjoint(r["id"] for r in records["validation", result["winner"]["decoder"]])
    difference, interval = paired_difference([r["solved"] for r in ours], [r["solved"] for r in theirs], [1.0] * 12)
    assert (result["test"]["difference"], result["test"]["difference_interval"]) == (difference, list(interval))
    for split in ("validation", "test"):
        spent = sum(r["nfe"] for (where, _), mine in records.items() if where == split for r in mine)
        assert result["forward_passes"][split] == spent
    assert result == json.loads((Path(chosen.output) / "front.json").read_text())


def test_records_are_those_of_an_evaluation(searched: tuple[TuneConfig, Result], tmp_path: Path) -> None:
    chosen, result = searched
    name = result["winner"]["decoder"]
    same = {"model": chosen.model, "task": ["countdown"], "max_new_tokens": 16, "decoder": [name], "limit": 12}
    summary = evaluate(EvalConfig(**same, output=str(tmp_path)))
    assert (
        lasting(summary["cells"][0]).items()
        >= {k: result["test"]["winner"][k] for k in ("solved", "nfe", "score")}.items()
    )


class Stop(Exception):
    pass


def test_killed_anywhere_and_resumed_equals_uninterrupted(
    searched: tuple[TuneConfig, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, whole = searched
    part = replace(chosen, output=str(tmp_path / "part"))
    run_cell, batches, kills = evaluation.run_cell, 0, 0

    def killed(*arguments: Any) -> Iterator[list[Result]]:
        nonlocal batches, kills
        for records in run_cell(*arguments):
            yield records
            batches += 1
            if batches % 23 == 11:  # in the middle of a share, and at its end
                kills += 1
                raise Stop

    monkeypatch.setattr(evaluation, "run_cell", killed)
    while True:
        try:
            result = tune(part)
            break
        except Stop:
            with (tmp_path / "part" / "measurements.jsonl").open("a") as file:
                file.write('{"split": "validation", "decoder": "cut o')
    assert kills >= 5
    assert lasting(result) == lasting(whole)
    assert lasting(measured(part.output)) == lasting(measured(chosen.output))  # each problem once
    monkeypatch.setattr(evaluation, "run_cell", None)  # all is there: nothing is decoded
    assert lasting(tune(part)) == lasting(result)


def test_a_kill_loses_no_finished_batch(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config(model, tmp_path, budget=1, limit=2, test_limit=12, batch_size=4)
    run_cell = evaluation.run_cell
    asked: list[int] = []

    def killed(request: Any, cell: Any, indexes: list[int], config: Any) -> Iterator[list[Result]]:
        if len(indexes) <= 2:
            yield from run_cell(request, cell, indexes, config)
            return
        asked.append(len(indexes))
        yield next(iter(run_cell(request, cell, indexes, config)))
        raise Stop

    monkeypatch.setattr(evaluation, "run_cell", killed)
    while True:
        try:
            tune(chosen)
            break
        except Stop:
            continue
    assert asked == [12, 8, 4]  # the batch before each kill is kept


def test_batch_size_does_not_change_results(searched: tuple[TuneConfig, Result], tmp_path: Path) -> None:
    chosen, whole = searched
    result = tune(replace(chosen, output=str(tmp_path), batch_size=5))
    without = {k: v for k, v in lasting(result).items() if k != "config"}
    assert without == {k: v for k, v in lasting(whole).items() if k != "config"}


def test_metric_and_guidance(model: str, tmp_path: Path) -> None:
    result = tune(config(model, tmp_path, metric="score", cfg_scale=[1.0], budget=2, limit=8, early_stop=False))
    found = {e["decoder"]: e for e in result["candidates"]}
    last = [found[name] for name in result["finalists"]]
    assert result["winner"]["score"] == max(e["score"] for e in last)
    guided = [e for e in found.values() if "cfg_scale" in e["decoder"]]
    assert guided and all(e["nfe"] >= 2 for e in guided)
    assert any(e["solved"] > result["winner"]["solved"] for e in last)  # so the metric made a difference


def test_all_presets_and_eight_candidates_at_least_are_left(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_space, "candidates", candidates)
    monkeypatch.setattr(module, "FINALISTS", FINALISTS)
    result = tune(config(model, tmp_path, budget=2, limit=17, test_limit=2))
    found = {e["decoder"]: e for e in result["candidates"]}
    within = [e for e in found.values() if e["nfe"] <= 2]
    assert sum(not e["preset"] for e in within) < 24  # a third alone is fewer
    left = [found[name] for name in result["finalists"]]
    assert [e for e in left if e["preset"]] == [e for e in within if e["preset"]] and len(left) > 3
    assert sum(not e["preset"] for e in left) == 8


def test_where_no_candidate_fits_the_preset_is_the_winner(model: str, tmp_path: Path) -> None:
    result = tune(config(model, tmp_path, budget=1, limit=2, test_limit=2))
    assert result["winner"] == result["best_preset"] and result["finalists"] == ["full:steps=1"]
    assert result["test"]["difference"] == 0 and len(measured(tmp_path)) == len(result["candidates"]) + 1
    assert "Take full:steps=1." in tune_report.sentences(result)[-1]
    assert len(tune_report.write(result, config(model, tmp_path, budget=1))) == 4


# ---- what it leaves --------------------------------------------------------------------------------------------------


def test_the_decoder_file_is_the_winner(
    searched: tuple[TuneConfig, Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, result = searched
    written = tune_report.write(result, chosen)
    assert [p.name for p in written] == ["front.md", "front.png", "front.svg", "decoder.yaml"]
    path = Path(chosen.output) / "decoder.yaml"
    winner = make_decoder(result["winner"]["decoder"], max_new_tokens=16)
    assert make_decoder(str(path)) == winner
    header = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert [line.split(":")[0] for line in header] == ["# task", "# model", "# budget", "# test", "# command"]
    assert f"{100 * result['test']['winner']['solved']:.1f} [" in header[3] and "of 12 unseen problems" in header[3]
    repeated = read_flags(TuneConfig, shlex.split(header[4].split(": ", 1)[1])[2:], prog="unmask tune")
    assert repeated == chosen
    settings = ["--model", chosen.model, "--task", "countdown", "--limit", "2", "--output", str(tmp_path / "eval")]
    assert main(["eval", *settings, "--decoder", str(path)]) == 0
    assert main(["generate", "make 5 from 1 2 2", "--model", chosen.model, "--decoder", str(path)]) == 0
    rollouts = DiffusionGRPOConfig(
        output_dir="x", tasks=["countdown"], decoder=str(path), max_completion_length=16
    ).rollout_decoder()
    assert rollouts == winner.replace(temperature=1.0)


def test_every_candidate_goes_through_the_decoder_file(searched: tuple[TuneConfig, Result], tmp_path: Path) -> None:
    chosen, result = searched
    for spec in itertools.chain(*candidates(8, 128, True, [0.5])):
        decoder = make_decoder(spec)
        settings = {**result["config"], "decoders": {spec: decoder.config()}}
        text = tune_report.decoder_file({**result, "config": settings, "winner": {"decoder": spec}}, chosen)
        (tmp_path / "decoder.yaml").write_text(text)
        found = make_decoder(str(tmp_path / "decoder.yaml"), temperature=1.0, max_new_tokens=64)
        assert found == decoder.replace(temperature=1.0)  # tuned for its canvas, not for a temperature


def test_the_command_prints_front_and_advice(
    searched: tuple[TuneConfig, Result], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, result = searched
    command(shlex.split(tune_report.command_line(chosen))[2:])
    said = capsys.readouterr().out
    table = (Path(chosen.output) / "front.md").read_text()
    for name in (*result["front"], *(e["decoder"] for e in result["candidates"] if e["preset"])):
        assert f"| {name} |" in table
    assert all(sentence in said and sentence in table for sentence in tune_report.sentences(result))
    assert "decoder.yaml" in said and "over the budget" in table


def test_names_with_brackets_are_shown_as_they_are(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[b]$x_^$").symlink_to(model)
    settings = [
        "--model",
        "[b]$x_^$",
        "--budget",
        "1",
        "--limit",
        "2",
        "--run-off-limit",
        "3",
        "--test-limit",
        "2",
        "--max-new-tokens",
        "16",
    ]
    command(["--task", "countdown", "--output", "out[/b][bold] :smile:", *settings])
    said = capsys.readouterr()
    assert "out[/b][bold] :smile:/decoder.yaml" in said.out and "[b]$x_^$, countdown" in " ".join(said.out.split())
    with progress_bars() as progress:
        progress("sudoku:[/b] · x", 1, 2)
    assert "sudoku:[/b] · x" in capsys.readouterr().err


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--task countdown --budget 0", "budget is 0: choose 1 or more"),
        ("--task countdown --budget 1 --cfg-scale 1", "budget is 1, and guidance takes 2 passes at least"),
        ("--task countdown --budget 4 --cfg-scale -1", "cfg_scale is -1.0: give positive numbers"),
        ("--task cuontdown --budget 4", "did you mean 'countdown'"),
        ("--task countdown:data=/dev/null --budget 4", "split 'validation' is only generated"),
        ("--task countdown --budget 4 --limit 0", "limit is 0: choose 1 or more"),
        ("--task countdown --budget 4 --test-limit 0", "test_limit is 0"),
        ("--task countdown --budget 4 --run-off-limit 0", "run_off_limit is 0"),
        ("--task countdown --budget 4 --max-new-tokens 0", "max_new_tokens is 0"),
        ("--task countdown --budget 4 --max-new-tokens 40000", "max_new_tokens is 40000"),
        ("--task countdown --budget 4 --batch-size 0", "batch_size is 0"),
        ("--task countdown --budget 4 --metric accuracy", "metric"),
        ("--task countdown --budget 4 --test-limit 4 --output /proc/nothing", "cannot write to /proc/nothing"),
        ("--task countdown", "--budget"),
        ("--task countdown --budget some", "budget"),
    ],
)
def test_mistakes(model: str, tmp_path: Path, flags: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        command(["--model", model, *flags.split()])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_too_few_problems_name_the_settings(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(*_: Any) -> list[Problem]:
        raise TooFewProblems("only 3 exist: ask for fewer")

    monkeypatch.setattr(Countdown, "problems", few)
    with pytest.raises(UserError, match=r"ask for fewer \(--limit 18 and --run-off-limit 23 ask for the larger"):
        tune(config(model, tmp_path))


def test_a_folder_belongs_to_one_search(
    searched: tuple[TuneConfig, Result], toy_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, _ = searched
    before = lasting(lines(chosen.output))
    for change in (
        {"budget": 5},
        {"limit": 16},
        {"run_off_limit": 19},
        {"test_limit": 8},
        {"metric": "score"},
        {"early_stop": False},
        {"seed": 1},
        {"cfg_scale": [0.5]},
        {"max_new_tokens": 32},
        {"model": toy_folder},
    ):
        with pytest.raises(
            UserError, match=rf"holds a search with other .*{next(iter(change))}.*give another --output"
        ):
            tune(replace(chosen, **change))
    assert lasting(lines(chosen.output)) == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        tune(chosen)


def test_measurements_without_their_settings_are_refused(searched: tuple[TuneConfig, Result], tmp_path: Path) -> None:
    chosen = replace(searched[0], output=str(tmp_path), model="/no/such/model")  # refused before it is loaded
    (tmp_path / "measurements.jsonl").write_bytes((Path(searched[0].output) / "measurements.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"measurements without the config\.json .*: give another --output"):
        tune(chosen)


def test_damaged_files_are_named(model: str, tmp_path: Path) -> None:
    chosen = config(model, tmp_path, budget=1, limit=2, test_limit=2)
    tune(chosen)
    path = tmp_path / "measurements.jsonl"
    whole = path.read_text()
    for damaged in ("[1]\n", "{\n", whole.replace('"nfe"', '"passes"')):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"measurements\.jsonl:1 is damaged .*: remove it"):
            tune(chosen)
    path.write_text(whole.replace('"id": "countdown', '"id": "sudoku'))
    with pytest.raises(UserError, match="holds records of other problems: give another --output"):
        tune(chosen)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged .*: give another --output"):
        tune(chosen)
