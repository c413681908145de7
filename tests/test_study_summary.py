"""A study's summary by hand: draws, intervals, differences, adjustments; curves of recorded trajectories."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from unmask import decode, load, make_decoder, make_task
from unmask.evaluation.curves import POSITION_BINS, TIME_BINS, curves
from unmask.evaluation.evaluate import EvalConfig, evaluate
from unmask.evaluation.prompts import task_prompts
from unmask.evaluation.records import read_records
from unmask.results.statistics import (
    Bootstrap,
    holm,
    paired_difference,
    wilson,
)
from unmask.results.summary import Group, markdown, summarize_study
from unmask.study.run import compact

TASK = "countdown:style=compact,max_value=9"


# ---- the summary -----------------------------------------------------------------------------------------------------------


def line(solved: str, seed: int = 0, problems: str = "p", **cell: Any) -> dict[str, Any]:
    n = len(solved)
    return {
        "key": f"{solved}{seed}{cell}",
        "cell": {"task": "t", "decoder": "a", **cell, "train.seed": seed},
        "problems": problems,
        "solved": solved,
        "points": [2.0 * (c == "1") for c in solved],
        "possible": [2] * n,
        "nfe": [7] * n,
        "committed": [14] * n,
        "length": list(range(n)),
        "budget": {"nfe": 7},
        "score_name": "s",
    }


def test_summary_by_hand() -> None:
    rng = np.random.default_rng(5)
    texts = ["".join(rng.choice(["0", "1"], 40, p=[0.6, 0.4])) for _ in range(4)]
    cells = [line(texts[i], seed=i % 2, decoder="ab"[i // 2]) for i in range(4)]
    summary = summarize_study(cells)
    first, second = summary["cells"]
    a, b = (np.array([[c == "1" for c in t] for t in pair], dtype=float) for pair in (texts[:2], texts[2:]))
    assert first["solved"] == a.mean() and second["score"] == b.mean() and first["seeds"] == 2
    assert first["nfe"] == 7 and first["tokens_per_forward"] == 2 and first["length"] == 19.5
    # A crossed bootstrap in plain loops: seeds and problems drawn, the same for both cells.
    draws = []
    for _ in range(4000):
        s, p = rng.integers(0, 2, 2), rng.integers(0, 40, 40)
        draws.append(b[s][:, p].mean() - a[s][:, p].mean())
    (difference,) = summary["differences"]
    assert difference["axis"] == "decoder" and difference["solved"] == pytest.approx(b.mean() - a.mean())
    half = stats.t.ppf(0.975, 1) * np.std(b.mean(1) - a.mean(1), ddof=1) / math.sqrt(2)  # over the seeds
    (low, high), mean = np.quantile(draws, [0.025, 0.975]), b.mean() - a.mean()
    assert difference["solved_interval"] == pytest.approx([min(low, mean - half), max(high, mean + half)], abs=0.02)
    p_of_seeds = stats.ttest_rel(b.mean(1), a.mean(1)).pvalue
    tail = min(np.mean(np.array(draws) <= 0), np.mean(np.array(draws) >= 0))
    assert difference["solved_p"] == pytest.approx(max(2 * tail, p_of_seeds), abs=0.03)
    draws = [a[rng.integers(0, 2, 2)][:, rng.integers(0, 40, 40)].mean() for _ in range(4000)]
    half = stats.t.ppf(0.975, 1) * np.std(a.mean(1), ddof=1) / math.sqrt(2)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert first["solved_interval"] == pytest.approx(
        [max(0, min(low, a.mean() - half)), min(1, max(high, a.mean() + half))], abs=0.02
    )
    assert difference["score_interval"] == difference["solved_interval"]


def test_seeds_with_other_problems_are_drawn_apart() -> None:
    """The same problems under two seeds are as uncertain as once; other problems are new evidence."""
    text = "01" * 50
    same = Group({}, [line(text, 0), line(text, 1)])
    other = Group({}, [line(text, 0, "p"), line(text, 1, "q")])
    once = Group({}, [line(text, 0)])
    spread = [float(np.std(Bootstrap().draws(*g.share("solved"), g.problems))) for g in (once, same, other)]
    assert spread[0] == pytest.approx(math.sqrt(0.25 / 100), rel=0.05)
    assert spread[1] == pytest.approx(spread[0], rel=0.03)
    first, second = Bootstrap(), Bootstrap()  # what a cell is given does not depend on the cells before it
    first.draws(*other.share("solved"), ("q", "p"))
    assert np.array_equal(first.draws(*once.share("solved"), ("p",)), second.draws(*once.share("solved"), ("p",)))
    assert spread[2] == pytest.approx(spread[0] * math.sqrt(0.75), rel=0.05)  # Var = (1/2 + 1/4) of one seed's


def test_cells_are_compared_with_equal_ones_alone() -> None:
    cells = [
        *[line("0011", decoder=d, gamma=g) for d in "ab" for g in (1, 2)],
        line("0011", problems="q", decoder="c", gamma=1),
    ]
    pairs = [(d["axis"], d["cell"]["decoder"], d["cell"]["gamma"]) for d in summarize_study(cells)["differences"]]
    assert pairs == [("decoder", "b", 1), ("decoder", "b", 2), ("gamma", "a", 2), ("gamma", "b", 2)]
    only = summarize_study(cells, ["gamma"])["differences"]
    assert {d["axis"] for d in only} == {"gamma"} and all(d["solved_p"] == 1 for d in only)


def test_one_seed_has_the_interval_of_an_evaluation() -> None:
    (cell,) = summarize_study([line("1111")])["cells"]
    assert cell["solved_interval"] == list(wilson(4, 4)) and cell["solved_interval"][0] < 0.6


def test_seeds_are_paired_by_name() -> None:
    """A study cut short: a has seeds 0 and 1, b has 1 and 2."""
    cells = [
        line("0000", 0, decoder="a"),
        line("0011", 1, decoder="a"),
        line("0111", 1, decoder="b"),
        line("1111", 2, decoder="b"),
    ]
    (difference,) = summarize_study(cells)["differences"]
    assert difference["solved"] == 0.25
    assert summarize_study([cells[0], cells[3]])["differences"] == []


def test_trained_models_stand_against_the_untrained_one() -> None:
    budget = {"nfe": 7, "updates": 1, "completions": 2, "training_passes": 3}
    base = {**line("0011"), "cell": {"task": "t", "decoder": "a", "train.objective": None, "train.seed": None}}
    trained = []
    for objective in ("cj", "diffu"):
        for seed in (0, 1):
            trained.append({**line("0111", seed, **{"train.objective": objective}), "budget": budget})
    summary = summarize_study([base, *trained])
    assert summary["axes"]["train.objective"] == ["cj", "diffu"]
    found = [(d["axis"], d["cell"]["train.objective"], d["solved"]) for d in summary["differences"]]
    assert found == [("train.objective", "diffu", 0.0), ("training", "cj", 0.25), ("training", "diffu", 0.25)]
    assert summary["budgets"] == {"updates": 1, "completions": 2, "training_passes": 3}


def test_decoders_stand_against_the_baseline_of_as_many_passes() -> None:
    cells = []
    for decoder, solved, passes in (
        ("full", "0011", 64),
        ("full:steps=7", "0001", 7),
        ("ass", "0111", 7),
        ("odd", "1111", 5),
    ):
        cells.append({**line(solved, decoder=decoder), "budget": {"nfe": passes}})
    summary = summarize_study(cells, ["decoder"], ["full", "full:steps=7"])
    found = {
        (d["cell"]["decoder"], d["against"]["decoder"]): d["solved"]
        for d in summary["differences"]
        if d["axis"] != "decoder"
    }
    assert found == {("ass", "full:steps=7"): 0.5}
    assert "Against the baseline of as many passes" in markdown(summary)


def test_of_several_baselines_the_one_with_the_same_settings_counts() -> None:
    """With guidance 32 steps take 64 passes: guided cells stand against guided baselines where there is one."""
    cells = [
        {**line(solved, decoder=decoder, cfg_scale=scale), "budget": {"nfe": 64}}
        for decoder, scale, solved in (
            ("full", 0, "0000"),
            ("full:steps=32", 1, "0001"),
            ("full:steps=32", 2, "0011"),
            ("ass", 2, "0111"),
            ("ass", 0, "0111"),
        )
    ]
    found = {
        (d["cell"]["cfg_scale"], d["against"]["decoder"], d["against"]["cfg_scale"]): d["solved"]
        for d in summarize_study(cells, ["decoder"], ["full", "full:steps=32"])["differences"]
        if d["axis"] == "equal passes"
    }
    assert found == {(2, "full:steps=32", 2): 0.25, (0, "full", 0): 0.75}


def test_holm_and_p_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == [] and holm([0.6, 0.9]) == [1.0, 1.0]
    assert Bootstrap.p(np.array([-1.0, 1.0, 1.0, 1.0])) == pytest.approx(2 * 2 / 5)
    assert Bootstrap.p(np.array([-1.0, -1.0, -1.0, 1.0])) == pytest.approx(2 * 2 / 5)
    assert Bootstrap.p(np.ones(99)) == pytest.approx(0.02) and Bootstrap.p(np.zeros(9)) == 1


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    a, b = [1.0, 0.0] * 100, [1.0, 0.0] * 95 + [0.0] * 10
    mean, (low, high) = paired_difference(a, b, [1.0] * 200)
    assert mean == pytest.approx(5 / 200) and 0 <= low < mean < high < 0.06


# ---- trajectories in records -----------------------------------------------------------------------------------------------


def test_records_keep_the_trajectory_that_decode_gives(toy_folder: str, tmp_path: Path) -> None:
    config = EvalConfig(
        model=toy_folder, task=[TASK], decoder=["eoser:steps=4"], limit=6, max_new_tokens=16, trajectories=True,
        early_stop=False, output=str(tmp_path),
    )  # fmt: skip
    summary = evaluate(config)
    records = read_records(next((tmp_path / "records").iterdir()))
    lm, task = load(toy_folder), make_task(TASK, {})
    ids, mask = lm.encode(task_prompts(lm, task, task.problems("test", 6)), 16)
    trajectory = decode(lm, ids, mask, make_decoder("eoser:steps=4", max_new_tokens=16))
    assert [r["tokens"] for r in records] == trajectory.tokens.tolist()
    assert [r["steps"] for r in records] == trajectory.step.tolist()
    assert torch.allclose(torch.tensor([r["logprobs"] for r in records]), trajectory.logprob, atol=1e-4)
    (cell,) = summary["cells"]
    ends = torch.isin(trajectory.tokens, torch.tensor(lm.end_ids))
    for s in range(4):
        now = trajectory.committed(s)
        assert cell["curves"]["commits"][s] == 4
        assert cell["curves"]["eos_share"][s] == pytest.approx(float((ends & now).sum() / now.sum()), abs=1e-6)
        for key, kind in (("end_confidence", ends), ("other_confidence", ~ends)):
            chosen = trajectory.logprob[now & kind].exp()
            expected = None if not len(chosen) else pytest.approx(float(chosen.mean()), abs=1e-4)
            assert cell["curves"][key][s] == expected
    made = compact("toy", records, summary)
    assert made["solved"] == "".join("01"[r["solved"]] for r in records) and made["curves"] == cell["curves"]


def test_order_by_hand() -> None:
    left_to_right = {"tokens": [5] * 32, "steps": [i // 2 for i in range(32)], "logprobs": [0.0] * 32}
    stopped = {"tokens": [5] * 32, "steps": [i // 2 if i < 16 else -1 for i in range(32)], "logprobs": [0.0] * 32}
    order = np.array(curves([left_to_right, stopped], [1], steps=16)["order"], dtype=float)
    assert order.shape == (TIME_BINS, POSITION_BINS)
    assert all(order[i // 2, i] == 1 for i in range(32)) and order.sum() == 32
    half = curves([stopped], [1], steps=16)
    assert half["order"][0][31] is None and half["commits"] == [2] * 8 and half["eos_share"] == [0] * 8
    ended = {"tokens": [5, 1, 1, 1], "steps": [0, 0, 1, 1], "logprobs": [0.0, math.log(0.5), math.log(0.25), 0.0]}
    found = curves([ended], [1], steps=2)
    assert found["eos_share"] == [0.5, 1] and found["end_confidence"] == [0.5, 0.625]
    assert found["other_confidence"] == [1, None] and found["commits"] == [2, 2]
    # A threshold's rows have their own clock: eight steps are the whole decode.
    own = np.array(curves([stopped], [1], steps=None)["order"], dtype=float)
    assert own[14, 15] == 1
