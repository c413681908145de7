"""The benchmark: what it compares computes the same thing, and its result is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unmask import UserError, bench
from unmask.bench import BenchRL, bench_rl, bench_trainer, measure, plain_update, random_rollout
from unmask.cli import main
from unmask.rl.gap import BenchGap, bench_gap
from unmask.rl.objectives import OBJECTIVES

SMALL = {
    "steps": (2, 4),
    "length": 16,
    "prompt": 8,
    "vocabulary": 200,
    "d_model": 32,
    "n_layers": 2,
    "mlp_hidden_size": 64,
    "repeats": 2,
}


def test_the_plain_way_has_the_same_gradient() -> None:
    """All graphs alive and full logits, or one backward a view with logits where scored: the same update."""
    config = BenchRL(**SMALL)  # type: ignore[arg-type]
    trainer = bench_trainer(config, "cj")
    trainer.model.to(torch.float64)
    rollout = random_rollout(config, trainer.lm, 4)
    trainer.update(trainer.model, rollout, 0)
    ours = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    plain_update(trainer.model, rollout)
    for mine, p in zip(ours, trainer.model.parameters(), strict=True):
        assert torch.allclose(mine, p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()))


def test_every_cell_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_measure_apart", measure)  # here, not in processes of their own
    result = bench_rl(BenchRL(**SMALL, output=str(tmp_path / "b.json")), lambda _: None)  # type: ignore[arg-type]
    ways = [(c["way"], c["steps"]) for c in result["cells"]]
    assert ways == [*((w, s) for w in ("cj", "bare", "plain") for s in (2, 4)), ("one-step", 1), ("diffu", 1)]
    assert all(c["seconds"] > 0 and c["peak_gib"] > 0 for c in result["cells"])
    assert json.loads((tmp_path / "b.json").read_text())["environment"]["torch"]
    huge = bench_rl(
        BenchRL(**{**SMALL, "repeats": 1}, memory_limit=1e-9, output=str(tmp_path / "c.json")), lambda _: None
    )  # type: ignore[arg-type]
    assert [c["way"] for c in huge["not_run"]] == ["plain", "plain"]


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="steps 200 does not fit a canvas of 128"):
        BenchRL(steps=(200,))
    with pytest.raises(UserError, match="rows is out of range"):
        BenchRL(rows=0)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is no GPU here"):
            BenchRL(device="cuda")
    for command in ("rl", "gap"):
        assert main(["bench", command, "--output", "/proc/nothing/x.json"]) == 2
        assert "cannot write to" in capsys.readouterr().err
    assert main(["bench", "decoding"]) == 2 and "choose from gap, rl" in capsys.readouterr().err
    assert main(["bench"]) == 2


def test_the_gap_is_rounding_for_cj_alone(toy_folder: str, tmp_path: Path) -> None:
    config = BenchGap(
        model=toy_folder,
        task=["countdown:style=compact"],
        decoder=["eoser-ass", "full"],
        limit=6,
        max_new_tokens=16,
        rows_per_forward=4,
        output=str(tmp_path / "gap.json"),
    )
    cells = bench_gap(config, lambda _: None)["cells"]
    assert [(c["decoder"], c["objective"]) for c in cells] == [(d, o) for d in config.decoder for o in OBJECTIVES]
    for cell in cells:
        low, high = cell["gap_interval"]
        assert low <= cell["gap"] <= high and cell["completions"] == 6
        assert cell["gap"] < 1e-5 if cell["objective"] == "cj" else cell["gap"] > 0.05
