"""The search for a decoder without a model: front and halving by hand, the decoders that are tried, the advice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from unmask import UserError, make_decoder
from unmask.config import read_flags
from unmask.decoding.decoder import PRESETS
from unmask.evaluation import tune_report
from unmask.evaluation.command import tune_command
from unmask.evaluation.tune import (
    Standing,
    decide,
    in_run_off,
    pareto,
    round_sizes,
    standing,
    successive_halving,
    top_fraction,
)
from unmask.evaluation.tune_config import TuneConfig
from unmask.evaluation.tune_space import behaviour, candidates

# ---- the search, without a model -------------------------------------------------------------------------------------


def standings(*found: tuple[str, float, float]) -> list[Standing]:
    return [Standing(*f) for f in found]


def test_front_by_hand() -> None:
    found = standings(
        ("a", 0.5, 8), ("b", 0.3, 2), ("c", 0.3, 4), ("d", 0.6, 9), ("e", 0.5, 8), ("f", 0.2, 1), ("g", 0.4, 2)
    )
    # c is no better than b at more passes, g beats b at the same, e equals a, which comes first.
    assert [s.name for s in pareto(found)] == ["f", "g", "a", "d"]
    assert pareto([]) == []


def test_better_part_by_hand() -> None:
    found = standings(
        ("a", 0.5, 8), ("b", 0.1, 1), ("c", 0.5, 6), ("d", 0.4, 9), ("e", 0.4, 7), ("f", 0.0, 2), ("g", 0.5, 7)
    )
    # Front: b, c. Then a (8 passes) before g (7) at 0.5. A third of seven is three, the others are left for a larger least.
    assert [s.name for s in top_fraction(found, 1)] == ["a", "b", "c"]
    assert [s.name for s in top_fraction(found, 5)] == ["a", "b", "c", "d", "g"]
    assert [s.name for s in top_fraction(found, 6)] == ["a", "b", "c", "d", "e", "g"]
    assert top_fraction(found, 99) == found
    assert [s.name for s in top_fraction(found[:2], 1)] == ["a"]  # both are on the front


def test_rounds() -> None:
    assert round_sizes(128) == [16, 32, 64, 128]
    assert round_sizes(100) == [16, 32, 64, 100]
    assert round_sizes(16) == [16] and round_sizes(3) == [3] and round_sizes(17) == [16, 17]


def test_halving_by_hand() -> None:
    # value and passes on 8, 16 and 32 problems
    table = {
        "a": [(0.5, 4.0), (0.5, 4.0), (0.50, 4.0)],
        "b": [(0.6, 5.0), (0.6, 5.5), (0.55, 5.0)],  # over the budget on 16: out, whatever follows
        "c": [(0.9, 5.1)],  # over it at once
        "d": [(0.1, 5.0)],
        "e": [(0.2, 4.5)],
        "f": [(0.3, 5.0), (0.7, 5.0), (0.40, 5.0)],
    }
    asked: list[tuple[list[str], int]] = []

    def measure(names: Sequence[str], size: int) -> list[Standing]:
        asked.append((list(names), size))
        return [Standing(name, *table[name][(8, 16, 32).index(size)]) for name in names]

    left = successive_halving("abcdef", [8, 16, 32], measure, 5.0, 1, ())
    # 8: within are a b d e f; two go on: a and b, the front. 16: b is out.
    assert asked == [(list("abcdef"), 8), (["a", "b"], 16), (["a"], 32)]
    assert left == [Standing("a", 0.5, 4.0)]


def test_the_best_that_cannot_exceed_the_budget_goes_on() -> None:
    table = {  # a, b and c look better on 8 problems, and are over the budget on 16
        "a": [(0.6, 31.9), (0.6, 33.0)],
        "b": [(0.5, 31.5), (0.5, 32.5)],
        "c": [(0.4, 31.0), (0.4, 32.1)],
        "d": [(0.3, 32.0), (0.2, 32.0)],
        "e": [(0.2, 32.0), (0.9, 32.0)],
    }

    def measure(names: Sequence[str], size: int) -> list[Standing]:
        return [Standing(name, *table[name][(8, 16).index(size)]) for name in names]

    assert successive_halving("abcde", [8, 16], measure, 32, 1, "de") == [Standing("d", 0.2, 32.0)]
    assert successive_halving("abcde", [8, 16], measure, 32, 1, "e") == [Standing("e", 0.9, 32.0)]
    assert successive_halving("abcde", [8, 16], measure, 32, 1, "") == []


def test_only_the_last_round_cuts_at_the_budget_itself() -> None:
    table: dict[str, list[tuple[float, float, float]]] = {
        "a": [(0.9, 5.9, 0.5), (0.9, 5.9, 0.5), (0.9, 4.9, 0.1)],  # within two standard errors, and at last within it
        "b": [(0.8, 5.9, 0.5), (0.8, 5.9, 0.5), (0.8, 5.1, 0.1)],  # at last over it, if not by much
        "c": [(0.9, 5.9, 0.4)],  # over it by more
        "d": [(0.1, 5.0), (0.1, 5.0), (0.1, 5.0)],
    }
    asked: list[list[str]] = []

    def measure(names: Sequence[str], size: int) -> list[Standing]:
        asked.append(list(names))
        return [Standing(name, *table[name][(8, 16, 32).index(size)]) for name in names]

    left = successive_halving("abcd", [8, 16, 32], measure, 5.0, 3, ())
    assert asked == [list("abcd"), list("abd"), list("abd")] and [s.name for s in left] == ["a", "d"]


def test_the_run_off_by_hand() -> None:
    found = standings(
        *(("abcdefg"[i], 0.9 - i / 10, 8) for i in range(7)), ("p", 0.1, 3), ("q", 0.1, 2), ("r", 0.0, 1), ("s", 0.2, 9)
    )
    # The six best, the best preset (q: of equals the cheaper), the best preset that cannot exceed the budget.
    assert in_run_off(found, presets="pqr", safe="ars") == list("abcdefqr")
    assert in_run_off(found, presets="apr", safe="a") == list("abcdef")
    assert in_run_off(found[-4:], presets="pqr", safe="pq") == list("sqpr")
    # On the run-off's problems the two best are over the budget, one of them the best preset.
    run_off = standings(("a", 0.9, 8.1), ("p", 0.8, 8.01), ("b", 0.7, 8), ("q", 0.6, 7), ("c", 0.7, 7), ("r", 0.6, 6))
    assert decide(run_off, 8, presets="pqr") == ("c", "r")


def test_a_standing_by_hand() -> None:
    records = [{"solved": s, "points": p, "possible": 4.0, "nfe": n} for s, p, n in ((True, 4.0, 3), (False, 1.0, 7))]
    assert standing("a", records, "solved") == Standing("a", 0.5, 5.0, 2.0)  # deviation sqrt(8), of two problems
    assert standing("a", records, "score") == Standing("a", 0.625, 5.0, 2.0)
    assert standing("a", records[:1], "solved") == Standing("a", 1.0, 3.0, 0.0)


# ---- the space -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 16, 100, 128])
@pytest.mark.parametrize("early_stop", [True, False])
def test_candidates_are_different_exact_and_near_the_budget(length: int, early_stop: bool) -> None:
    for budget in (1, 8, 300):
        presets, others = candidates(budget, length, early_stop, [])
        decoders = [make_decoder(spec, max_new_tokens=length) for spec in (*presets, *others)]
        assert len({behaviour(d) for d in decoders}) == len(decoders) < 250
        assert all(d.top_p == 1 and d.cache == "none" and d.temperature == 0 and d.cfg_scale == 0 for d in decoders)
        assert all(spec.split(":")[0] in PRESETS for spec in presets)
        assert any(d.passes <= budget and d.threshold is None for d in decoders[: len(presets)])
        if not early_stop:
            assert all(d.threshold is not None or d.passes <= budget for d in decoders)


def test_the_space_holds_every_family() -> None:
    presets, others = candidates(8, 128, True, [])
    assert {"ass", "eoser-ass", "full:steps=8", "semi-ar:steps=8", "threshold", "hybrid"} <= set(presets)
    assert not any("dream" in spec for spec in presets)
    found = "full:steps=8,confidence=margin eoser:gamma_min=0.01,steps=16 hard-eos:threshold=0.9 ass:blocks=7"
    found += " semi-ar:block_length=16,steps=16,confidence=entropy hybrid:block_length=64,confidence=entropy"
    assert set(found.split()) <= set(others)
    # ascending plans take 7 passes: those of a budget of 32 are only the presets
    assert not any("ass" in spec for spec in candidates(32, 128, True, [])[1])
    # one step a block commits all that is open, so the confidence makes no difference
    assert (
        "semi-ar:block_length=16,steps=8" in others
        and "semi-ar:block_length=16,steps=8,confidence=margin" not in others
    )


def test_behaviour_by_hand() -> None:
    def same(one: str, other: str, length: int) -> bool:
        found = [behaviour(make_decoder(spec, max_new_tokens=length)) for spec in (one, other)]
        return found[0] == found[1]

    assert same("full", "full:steps=64", 128)
    assert same("hybrid:block_length=2", "semi-ar:block_length=2", 16)  # a block of two in one step
    assert same("ass", "full:steps=1", 2) and same("ass", "eoser-ass", 2)  # all at once
    assert same("full:steps=1", "eoser:steps=1,confidence=margin", 16)
    assert same("full:threshold=0.5", "hard-eos:threshold=0.9", 1)
    assert same("full:gamma_min=0.1", "full", 16)  # without EOS rejection no gamma is read
    for one, other in (
        ("full:steps=8", "full:steps=4"),
        ("full:steps=8", "full:steps=8,confidence=margin"),
        ("full:steps=8", "eoser:steps=8"),
        ("eoser:steps=8", "eoser:steps=8,gamma_min=0.1"),
        ("eoser:steps=8", "hard-eos:steps=8"),
        ("full:steps=8", "full:steps=8,block_length=8"),
        ("full:steps=1", "full:steps=1,cfg_scale=1"),
        ("full:threshold=0.5", "full:threshold=0.7"),
    ):
        assert not same(one, other, 16), (one, other)


def test_guidance_is_tried_at_half_the_passes() -> None:
    plain, guided = (candidates(8, 128, False, scales)[1] for scales in ([], [0.5]))
    added = [make_decoder(spec) for spec in guided if spec not in plain]
    assert set(plain) <= set(guided) and added and all(d.cfg_scale == 0.5 for d in added)
    assert max(d.passes for d in added if d.threshold is None) == 8
    assert {"full:steps=2,cfg_scale=0.5", "full:steps=4,cfg_scale=0.5"} <= set(guided)
    assert make_decoder("full:steps=4,cfg_scale=0.5").passes == 8


# ---- the advice -------------------------------------------------------------------------------------------------------


MEASURED = {"plan": 4, "problems": 12, "solved": 0.5, "solved_interval": [0.25, 0.75], "nfe": 4.0}
RESULT: dict[str, Any] = {
    "config": {
        "budget": 4,
        "metric": "solved",
        "max_new_tokens": 16,
        "model": {"name": "toy", "weights": "0123"},
        "decoders": {"full:steps=4": make_decoder("full:steps=4", max_new_tokens=16).config()},
    },
    "candidates": [],
    "rounds": [8],
    "run_off": [],
    "forward_passes": {"validation": 100, "test": 50},
    "winner": {**MEASURED, "decoder": "full:steps=4"},
    "test": {
        "winner": {**MEASURED, "decoder": "W"},
        "best_preset": {**MEASURED, "decoder": "P"},
        "difference": 0.0,
        "difference_interval": [-0.1, 0.1],
    },
}


def test_rows_by_hand() -> None:
    def entry(decoder: str, problems: int, solved: float, nfe: float = 4.0) -> dict[str, Any]:
        measured = {"plan": 9, "score": 0.0, "score_interval": [0.0, 0.0], "solved_interval": [0.0, 1.0]}
        facts = {"decoder": decoder, "preset": decoder in "pq", "problems": problems, "solved": solved, "nfe": nfe}
        return {**measured, **facts}

    candidates = [entry("p", 16, 0.4), entry("q", 8, 0.3, 4.6), entry("a", 16, 0.5), entry("b", 16, 0.2, 3.0)]
    run_off = [entry("a", 40, 0.35), entry("p", 40, 0.45), entry("b", 40, 0.1, 4.2)]
    chosen = {"candidates": candidates, "front": ["b", "a"], "run_off": run_off, "winner": run_off[1]}
    rows = tune_report.rows({**RESULT, **chosen, "best_preset": run_off[1]})
    assert [(row[0], row[3].split()[0], row[5], row[6]) for row in rows] == [
        ("b", "20.0", "16", ""),
        ("a", "50.0", "16", ""),
        ("p", "40.0", "16", "preset"),
        ("q", "30.0", "8", "preset, over the budget"),
        ("p", "45.0", "40", "winner, best preset"),
        ("a", "35.0", "40", ""),
        ("b", "10.0", "40", "over the budget"),
    ]


def test_advice_by_hand() -> None:
    def said(difference: float, low: float, high: float, ours: float = 8.0, theirs: float = 8.0) -> str:
        both = {"winner": {"decoder": "W", "nfe": ours}, "best_preset": {"decoder": "P", "nfe": theirs}}
        return tune_report.verdict({**both, "difference": difference, "difference_interval": [low, high]}, 8)

    assert said(0.1, 0.01, 0.2) == "The winner is better. Take W."
    assert said(0.1, 0.0, 0.2).endswith("it may be chance. Take W.")
    assert said(-0.1, -0.2, 0.1) == "What the search found does not show on unseen problems. Take the preset P."
    assert said(0.0, 0.0, 0.0).endswith("Take the preset P.")
    assert said(-0.1, -0.2, -0.01) == "The preset is better on unseen problems. Take the preset P."
    # over the budget of 8
    over = "more than the budget of 8: where that matters,"
    assert said(0.1, 0.01, 0.2, ours=8.2).endswith(f"Take W. On test W takes 8.2 passes a problem, {over} take P.")
    assert said(0.1, 0.01, 0.2, ours=8.2, theirs=9).endswith(f"{over} search again with a lower one.")
    assert said(-0.1, -0.2, -0.01, theirs=8.25).endswith(f"On test P takes 8.25 passes a problem, {over} take W.")
    assert said(-0.1, -0.2, 0.01, ours=9, theirs=9).endswith(f"{over} search again with a lower one.")
    assert "budget" not in said(0.1, 0.01, 0.2, theirs=9) + said(-0.1, -0.2, -0.01, ours=9)


def test_the_budget_on_test_and_a_preset_that_wins_are_said() -> None:
    plain, preset = RESULT, RESULT["test"]["best_preset"]
    assert tune_report.sentences(plain)[-1].endswith(tune_report.verdict(plain["test"], 4))
    same = {**plain, "test": {**plain["test"], "winner": preset}}
    assert tune_report.sentences(same)[-1] == "No candidate was better than this preset on validation. Take P."
    dear = {**same["test"], "winner": {**preset, "nfe": 4.2}, "best_preset": {**preset, "nfe": 4.2}}
    assert tune_report.sentences({**plain, "test": dear})[-1].endswith(
        "Take P. On test P takes 4.2 passes a problem, more than the budget of 4: where that matters, search again with a "
        "lower one."
    )


def test_presets_that_do_not_fit_the_canvas_are_said() -> None:
    said = "Not tried, since their blocks do not divide 16 tokens: semi-ar, semi-ar-random, threshold, hybrid."
    assert said in tune_report.sentences(RESULT)
    fitting = {**RESULT, "config": {**RESULT["config"], "max_new_tokens": 64}}
    assert not any("Not tried" in sentence for sentence in tune_report.sentences(fitting))


@pytest.mark.parametrize("task", ["countdown", " countdown  ", "countdown: numbers=3, max_value=9"])
@pytest.mark.parametrize("folder", ["a  b", "it's \\ # a 'b$(c)", "é: &"])
def test_the_command_in_the_decoder_file_is_the_command(tmp_path: Path, task: str, folder: str) -> None:
    chosen = TuneConfig(task=task, budget=4, output=folder)
    text = tune_report.decoder_file(RESULT, chosen)
    (tmp_path / "decoder.yaml").write_text(text, encoding="utf-8")
    assert make_decoder(str(tmp_path / "decoder.yaml")).name == "full:steps=4"
    said = next(line for line in text.split("\n") if line.startswith("# command: ")).removeprefix("# command: ")
    script = said.replace("unmask tune ", "printf '%s\\0' ", 1).encode()
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert read_flags(TuneConfig, words, prog="unmask tune") == chosen


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--task cuontdown", "did you mean 'countdown'"),
        ("--task countdown --output /proc/nothing", "cannot write to /proc"),
    ],
)
def test_what_needs_no_model_is_found_without_it(flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tune_command(["--model", "/no/such/model", "--budget", "4", *flags.split()])


def test_a_typo_does_not_wait_for_torch() -> None:
    code = """
import sys
from unmask.cli import main
for flags in ("--bugdet 4", "--task countdown", "--task countdown --budget 0"):
    assert main(["tune", *flags.split()]) == 2
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
