"""Trajectories in an evaluation's records, and the curves over their steps, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask import decode, load, make_decoder, make_task
from unmask.evaluation.curves import POSITION_BINS, TIME_BINS, curves
from unmask.evaluation.evaluate import EvalConfig, evaluate
from unmask.evaluation.prompts import task_prompts
from unmask.evaluation.records import read_records

TASK = "countdown:style=compact,max_value=9"


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
