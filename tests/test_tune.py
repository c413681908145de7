"""The search for a decoder: its parts by hand, on a toy model resumed = uninterrupted, what it leaves, what it refuses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unmask import PRESETS, DiffusionGRPOConfig, Grade, Problem, UserError, make_decoder
from unmask.cli import main
from unmask.evaluation import tune as module
from unmask.evaluation.command import tune_command
from unmask.evaluation.config import TuneConfig
from unmask.evaluation.tune import Result, Standing, advice, pareto, report, tune
from unmask.evaluation.tune_space import behavior, candidates
from unmask.results.statistics import paired_difference
from unmask.tasks.base import bucket
from unmask.tasks.countdown import Countdown

Searched = tuple[TuneConfig, Result]


def standings(text: str) -> list[Standing]:
    return [Standing(name, float(value), float(nfe)) for name, value, nfe in map(str.split, text.split(","))]


def names(found: Sequence[Standing]) -> str:
    return "".join(s.name for s in found)


def test_front_top_fraction_and_run_off_by_hand() -> None:
    found = standings("a 0.5 8, b 0.3 2, c 0.3 4, d 0.6 9, e 0.5 8, f 0.2 1, g 0.4 2")
    # c is no better than b at more passes, g beats b at the same, e equals a, which comes first.
    assert names(pareto(found)) == "fgad" and pareto([]) == []
    found = standings("a 0.5 8, b 0.1 1, c 0.5 6, d 0.4 9, e 0.4 7, f 0.0 2, g 0.5 7")
    # Front: b, c. Then a (8 passes) before g (7) at 0.5. A third of seven is three, the others are left for a larger least.
    for least, kept in ((1, "abc"), (5, "abcdg"), (99, "abcdefg")):
        assert names(module.top_fraction(found, least)) == kept
    found = standings("a .9 8, b .8 8, c .7 8, d .6 8, e .5 8, f .4 8, g .3 8, p .1 3, q .1 2, r 0 1, s .2 9")
    # The six best, the best preset (q: of equals the cheaper), the best preset that cannot exceed the budget.
    assert module.in_run_off(found, presets="pqr", safe="ars") == list("abcdefqr")
    assert module.in_run_off(found, presets="apr", safe="a") == list("abcdef")


# b is over the budget on 16 problems, c at once.
HALVED = {"a": 3 * [(0.5, 4.0)], "b": [(0.6, 5.0), (0.6, 5.5)], "c": [(0.9, 5.1)]}
HALVED |= {"d": [(0.1, 5.0)], "e": [(0.2, 4.5)], "f": [(0.3, 5.0)]}
# a looks better on 8 problems, and is over the budget on 16.
SAFE = {"a": [(0.6, 4.9), (0.6, 6.0)], "b": [(0.3, 5.0), (0.2, 5.0), (0.2, 5.0)], "c": [(0.2, 5.0)]}
# Only the last round cuts at the budget itself, the others two standard errors above it.
SLACK = {"a": [*(2 * [(0.9, 5.9, 0.5)]), (0.9, 4.9, 0.1)], "b": [*(2 * [(0.8, 5.9, 0.5)]), (0.8, 5.1, 0.1)]}
SLACK |= {"c": [(0.9, 5.9, 0.4)], "d": 3 * [(0.1, 5.0)]}


@pytest.mark.parametrize(
    ("table", "least", "safe", "left", "asked"),
    [
        (HALVED, 1, "", "a", "8abcdef 16ab 32a"),
        (SAFE, 1, "bc", "b", "8abc 16ab 32b"),  # the best that cannot exceed the budget continues
        (SAFE, 1, "", "", "8abc 16a 32"),
        (SLACK, 3, "", "ad", "8abcd 16abd 32abd"),
    ],
)
def test_halving_by_hand(table: dict[str, list[Any]], least: int, safe: str, left: str, asked: str) -> None:
    rounds: list[str] = []

    def measure(names: Sequence[str], size: int) -> list[Standing]:
        rounds.append(f"{size}{''.join(names)}")
        return [Standing(name, *table[name][(8, 16, 32).index(size)]) for name in names]

    assert names(module.successive_halving([*table], (8, 16, 32), measure, 5.0, least, safe)) == left
    assert " ".join(rounds) == asked


@pytest.mark.parametrize(("length", "early_stop"), [(1, True), (16, False), (100, True), (128, False)])
@pytest.mark.parametrize("budget", [1, 8, 300])
def test_candidates_are_different_exact_and_near_the_budget(length: int, early_stop: bool, budget: int) -> None:
    presets, others = candidates(budget, length, early_stop, [])
    decoders = [make_decoder(spec, max_new_tokens=length) for spec in (*presets, *others)]
    assert len({behavior(d) for d in decoders}) == len(decoders) < 250
    assert all(d.top_p == 1 and d.cache == "auto" and d.temperature == 0 and d.cfg_scale == 0 for d in decoders)
    assert any(d.passes <= budget and not d.adaptive for d in decoders[: len(presets)])
    assert early_stop or all(d.adaptive or d.passes <= budget for d in decoders)


def test_the_space_holds_every_family() -> None:
    presets, others = candidates(8, 128, True, [])
    assert {"ass", "eoser-ass", "full:steps=8", "semi-ar:steps=8", "threshold", "hybrid"} <= set(presets)
    assert {spec.split(":")[0] for spec in presets} == set(PRESETS) - {"dream", "rho-eos"}
    found = "full:steps=8,confidence=margin eoser:gamma_min=0.01,steps=16 hard-eos:threshold=0.9 ass:blocks=7"
    found += " semi-ar:block_length=16,steps=16,confidence=entropy hybrid:block_length=64,confidence=entropy"
    # one step a block commits all that is open, so the confidence makes no difference
    found += " semi-ar:block_length=16,steps=8"
    assert set(found.split()) <= set(others) and "semi-ar:block_length=16,steps=8,confidence=margin" not in others
    # ascending plans take 7 passes: those of a budget of 32 are only the presets
    assert not any("ass" in spec for spec in candidates(32, 128, True, [])[1])
    added = set(candidates(8, 128, True, [0.5])[1]) - set(others)  # guidance, at half the passes
    assert {"full:steps=2,cfg_scale=0.5", "full:steps=4,cfg_scale=0.5"} <= added
    assert all(make_decoder(spec).cfg_scale == 0.5 for spec in added)


def test_behavior_by_hand() -> None:
    def same(one: str, other: str, length: int = 16) -> bool:
        first, second = (behavior(make_decoder(spec, max_new_tokens=length)) for spec in (one, other))
        return first == second

    assert same("full", "full:steps=64,gamma_min=0.1", 128) and same("full:threshold=0.5", "hard-eos:threshold=0.9", 1)
    assert same("hybrid:block_length=2", "semi-ar:block_length=2")  # a block of two in one step
    assert same("full:steps=1", "eoser:steps=1,confidence=margin")  # all at once
    others = ["full:steps=4", "full:steps=8,confidence=margin", "eoser:steps=8", "full:steps=8,block_length=8"]
    differ = [("full:steps=8", other) for other in others] + [("full:threshold=0.5", "full:threshold=0.7")]
    differ += [("eoser:steps=8", "eoser:steps=8,gamma_min=0.1"), ("full:steps=1", "full:steps=1,cfg_scale=1")]
    assert not any(same(one, other) for one, other in differ)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """A quarter of the candidates; and since a random model solves nothing, grades by the hash of a text."""

    def some(*arguments: Any) -> tuple[list[str], list[str]]:
        presets, others = candidates(*arguments)
        return presets, others[::4]

    def grade(task: Countdown, problem: Problem, completion: str) -> Grade:
        return Grade(bucket(completion, 3) == 0, float(bucket(completion, 5)), 4.0, completion)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Countdown, "grade", grade)
        for name, value in (("candidates", some), ("MIN_SURVIVORS", 4), ("FIRST_ROUND", 4)):
            patch.setattr(module, name, value)
        yield


def config(model: str, output: Path, **changes: object) -> TuneConfig:
    values = {"task": "countdown", "budget": 4, "max_new_tokens": 16, "limit": 9, "run_off_limit": 12, "test_limit": 8}
    return TuneConfig(model=model, output=str(output), **{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def searched(model: str, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    chosen = config(model, tmp_path_factory.mktemp("search"))
    return chosen, tune(chosen)


def measured(output: str | Path) -> dict[tuple[str, str], list[Result]]:
    """Records by split and decoder, in order of their index."""
    records: dict[tuple[str, str], list[Result]] = {}
    for line in map(json.loads, (Path(output) / "measurements.jsonl").read_text().splitlines()):
        records.setdefault((line["split"], line["decoder"]), []).append(line)
    return {key: sorted(mine, key=lambda r: r["index"]) for key, mine in records.items()}


def lasting(value: Any) -> Any:
    """Without seconds and hardware."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if k not in ("seconds", "environment", "batch_size")}
    return [lasting(v) for v in value] if isinstance(value, list) else value


def test_result_is_what_the_measurements_say(searched: Searched) -> None:
    chosen, result = searched
    records, found = measured(chosen.output), {e["decoder"]: e for e in result["candidates"]}
    assert result["rounds"] == [4, 8, 9] and {4, 9} <= {e["problems"] for e in result["candidates"]} <= {4, 8, 9}
    decided = {e["decoder"]: e for e in result["run_off"]}
    for name, entry in [*found.items(), *decided.items()]:
        all_of_it = records["validation", name]
        assert [r["index"] for r in all_of_it] == list(range((decided.get(name) or entry)["problems"]))
        mine = all_of_it[: entry["problems"]]
        assert entry["solved"] == sum(r["solved"] for r in mine) / len(mine)
        assert entry["nfe"] == sum(r["nfe"] for r in mine) / len(mine)
    last = [found[name] for name in result["finalists"]]
    assert all(e["problems"] == 9 and e["nfe"] <= chosen.budget for e in last)
    over = {e["decoder"] for e in found.values() if e["nfe"] > chosen.budget}
    assert over and not over & set(result["finalists"])
    assert result["front"] == [s.name for s in pareto([Standing(e["decoder"], e["solved"], e["nfe"]) for e in last])]
    assert set(decided) < set(result["finalists"]) and {e["problems"] for e in decided.values()} == {12}
    within = sorted((e for e in decided.values() if e["nfe"] <= chosen.budget), key=lambda e: (-e["solved"], e["nfe"]))
    assert (result["winner"], result["best_preset"]) == (within[0], next(e for e in within if e["preset"]))
    ours, theirs = (records["test", result[k]["decoder"]] for k in ("winner", "best_preset"))
    assert len(ours) == len(theirs) == 8
    assert {r["id"] for r in ours}.isdisjoint(r["id"] for r in records["validation", result["winner"]["decoder"]])
    difference, interval = paired_difference([r["solved"] for r in ours], [r["solved"] for r in theirs], [1.0] * 8)
    assert (result["test"]["difference"], result["test"]["difference_interval"]) == (difference, list(interval))
    for split in ("validation", "test"):
        spent = sum(r["nfe"] for (where, _), mine in records.items() if where == split for r in mine)
        assert result["forward_passes"][split] == spent
    assert result == json.loads((Path(chosen.output) / "front.json").read_text())


def test_killed_anywhere_in_other_batches_and_resumed_equals_uninterrupted(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, whole = searched
    part = replace(chosen, output=str(tmp_path / "part"), batch_size=5)
    run_cell, batches, kills = module.run_cell, 0, 0

    def killed(*arguments: Any) -> Iterator[list[Result]]:
        nonlocal batches, kills
        for records in run_cell(*arguments):
            yield records
            batches += 1
            if batches % 17 == 5:  # in the middle of a share, and at its end
                kills += 1
                raise EOFError

    monkeypatch.setattr(module, "run_cell", killed)
    while True:
        try:
            result = tune(part)
            break
        except EOFError:
            with (tmp_path / "part" / "measurements.jsonl").open("a") as file:
                file.write('{"split": "validation", "decoder": "cut o')
    assert kills >= 3 and lasting(result) == lasting(whole)
    assert lasting(measured(part.output)) == lasting(measured(chosen.output))  # each problem once
    batches = 0
    assert lasting(tune(part)) == lasting(result) and batches == 0  # all is there: nothing is decoded


def test_metric_and_guidance(model: str, tmp_path: Path) -> None:
    limits = {"limit": 8, "run_off_limit": 1, "test_limit": 2}
    result = tune(config(model, tmp_path, metric="score", cfg_scale=[1.0], budget=2, early_stop=False, **limits))
    found = {e["decoder"]: e for e in result["candidates"]}
    last = [found[name] for name in result["finalists"]]
    assert result["winner"]["score"] == max(e["score"] for e in last)
    guided = [e for e in found.values() if "cfg_scale" in e["decoder"]]
    assert guided and all(e["nfe"] >= 2 for e in guided)
    assert any(e["solved"] > result["winner"]["solved"] for e in last)  # so the metric made a difference


def test_the_decoder_file_is_the_winner(searched: Searched, tmp_path: Path) -> None:
    chosen, result = searched
    report(result, tmp_path)
    path = tmp_path / "decoder.yaml"
    winner = make_decoder(result["winner"]["decoder"], max_new_tokens=16)
    assert make_decoder(str(path)) == winner
    header = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
    assert "countdown: decoders within 4 passes" in header[0] and header[1:] == advice(result)
    assert main(["generate", "make 5 from 1 2 2", "--model", chosen.model, "--decoder", str(path)]) == 0
    settings = {"output_dir": "x", "tasks": ["countdown"], "decoder": str(path), "max_completion_length": 16}
    assert DiffusionGRPOConfig(**settings).rollout_decoder() == winner.replace(temperature=1.0)  # type: ignore[arg-type]
    report({**result, "config": {**result["config"], "model": {"name": "a\nb\x85c: é"}}}, tmp_path)
    assert make_decoder(str(path)) == winner  # the name is inside the comment


def test_the_command_prints_front_and_advice(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here no candidate fits, so a preset is the winner."""
    monkeypatch.chdir(tmp_path)
    Path("[b]$x_^$").symlink_to(model)
    flags = shlex.split("--task countdown --budget 1 --limit 2 --run-off-limit 1 --test-limit 2 --max-new-tokens 16")
    tune_command(["--model", "[b]$x_^$", "--output", "out[/b][bold] :smile:", *flags])
    said, folder = capsys.readouterr().out, Path("out[/b][bold] :smile:")
    table, result = (folder / "front.md").read_text(), json.loads((folder / "front.json").read_text())
    assert all(f"| {e['decoder']} |" in table for e in result["candidates"] if e["preset"])
    assert all(sentence in said and sentence in table for sentence in advice(result))
    assert f"{folder}/decoder.yaml" in said and "[b]$x_^$, countdown" in " ".join(said.split())
    assert result["winner"] == result["best_preset"] and result["finalists"] == ["full:steps=1"]
    assert result["test"]["difference"] == 0 and advice(result)[-1].endswith("Take full:steps=1.")


def entry(decoder: str, problems: int, solved: float, nfe: float = 4.0) -> Result:
    facts = {"decoder": decoder, "preset": decoder in "pq", "plan": 9, "problems": problems, "nfe": nfe}
    return {**facts, "solved": solved, "solved_interval": [0.0, 1.0], "score": 0.0, "score_interval": [0.0, 0.0]}


def test_rows_by_hand() -> None:
    found = [entry("p", 16, 0.4), entry("q", 8, 0.3, 4.6), entry("a", 16, 0.5), entry("b", 16, 0.2, 3.0)]
    run_off = [entry("a", 40, 0.35), entry("p", 40, 0.45), entry("b", 40, 0.1, 4.2)]
    result = {"config": {"budget": 4, "metric": "solved"}, "candidates": found, "front": ["b", "a"], "run_off": run_off}
    made = module.rows({**result, "winner": run_off[1], "best_preset": run_off[1]})
    assert [f"{row[0]} {row[3].split()[0]} {row[5]} {row[6]}" for row in made] == [
        *("b 20.0 16 ", "a 50.0 16 ", "p 40.0 16 preset", "q 30.0 8 preset, over the budget"),
        *("p 45.0 40 winner, best preset", "a 35.0 40 ", "b 10.0 40 over the budget"),
    ]


@pytest.mark.parametrize(
    ("difference", "low", "high", "passes", "said"),
    [
        (0.1, 0.01, 0.2, 8, "+10.0 [+1.0, +20.0] points: the winner is better. Take W."),
        (-0.1, -0.2, 0.1, 9, "points: the preset is not clearly better. Take P."),
        (0.1, 0.01, 0.2, 8.2, "On test it takes 8.2 passes a problem, more than the budget of 8."),
    ],
)
def test_advice_by_hand(difference: float, low: float, high: float, passes: float, said: str) -> None:
    sides = {"winner": entry("W", 12, 0.5, passes), "best_preset": entry("P", 12, 0.5, 8)}
    result = {"config": {"budget": 8, "metric": "solved"}, "candidates": [], "rounds": [8], "run_off": []}
    result |= {"forward_passes": {"validation": 100, "test": 50}, "winner": sides["winner"]}
    test = {**sides, "difference": difference, "difference_interval": [low, high]}
    assert advice({**result, "test": test})[-1].endswith(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--budget 0", "budget is 0: choose 1 or more"),
        ("--budget 1 --cfg-scale 1", "budget is 1, but guidance takes 2 passes"),
        ("--budget 4 --cfg-scale -1", "use positive numbers"),
        ("--budget 4 --task cuontdown --model /no/such/model", "did you mean 'countdown'"),  # found without it
        ("--budget 4 --task countdown:data=/dev/null", "split 'validation' is only generated"),
        ("--budget 4 --max-new-tokens 40000", "is 40000: choose less"),
        ("--metric solved", "--budget"),
        ("--budget 4 --limit 1 --run-off-limit 1 --test-limit 1 --output /proc/nothing", "cannot write to /proc"),
    ],
)
def test_mistakes(model: str, tmp_path: Path, flags: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        tune_command(["--model", model, "--task", "countdown", *flags.split()])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_belongs_to_one_search(searched: Searched, toy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, _ = searched
    before = measured(chosen.output)
    for change in ({"budget": 5}, {"model": toy_folder}, {"metric": "score"}):
        with pytest.raises(UserError, match=rf"holds results with other .*{next(iter(change))}.*choose another"):
            tune(replace(chosen, **change))  # type: ignore[arg-type]
    assert measured(chosen.output) == before
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        tune(chosen)
