"""Folders as ``unmask eval``, ``unmask rl`` and a study leave them, small and with known numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from unmask.evaluation.records import summarize
from unmask.io.files import slug, write_json
from unmask.io.store import as_lines

HOSTILE = "full:note=<b>&\"'</script><script>x</script>"
STEPS = 4


def curves(shift: float = 0.0) -> dict[str, Any]:
    order = [[None if at == 31 else float(at % STEPS * 4 == row) for at in range(32)] for row in range(16)]
    confidences = {"end_confidence": [None, 0.5, None, 0.75], "other_confidence": [1.0, 0.9, 0.8 - shift, None]}
    return {"commits": [8.0] * STEPS, "eos_share": [0.0, 0.25 + shift, None, 1.0], **confidences, "order": order}


def records(count: int, solved: int, nfe: int, length: int = 20) -> list[dict[str, Any]]:
    """The first ``solved`` of them solved; lengths count up from ``length``."""
    fixed = {"prompt": "q", "completion": '"length": 9999', "possible": 2.0, "nfe": nfe}
    fixed |= {"committed": 32, "seconds": 0.5}
    return [
        {"index": i, "id": f"p{i}", "solved": i < solved, "points": float(i < solved), "length": length + i, **fixed}
        for i in range(count)
    ]


def evaluation(folder: Path, cells: dict[str, list[dict[str, Any]]], task: str = "sudoku", **more: Any) -> Path:
    """A folder as ``unmask eval`` leaves it; ``more`` goes into every cell of its summary."""
    config = {"model": {"name": "toy"}, "split": "test"}
    names = {"task": task, "score_name": "cell accuracy"}
    found = [{**names, "decoder": decoder, **summarize(rows), **more} for decoder, rows in cells.items()]
    (folder / "records").mkdir(parents=True)
    for decoder, rows in cells.items():
        (folder / "records" / f"{slug(task)}--{slug(decoder)}.jsonl").write_text(as_lines(rows), encoding="utf-8")
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", {"config": config, "environment": {"unmask": "1"}, "cells": found})
    return folder


def metrics(start: float) -> list[dict[str, float]]:
    fixed = {"length": 20.0, "logprob_mismatch": 1e-3, "nfe": 7.0}
    lines = [{"step": s, "reward": start + s / 10, **fixed} for s in range(1, 5)]
    solved = [{"step": s, "eval_sudoku_solved": v} for s, v in ((0, 0.25), (2, start), (4, start))]
    return [{"step": 0, "eval_reward": 0.1}, *lines, *solved]


def lines(values: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(v) + "\n" for v in values)


def run(folder: Path, seed: int, **config: Any) -> Path:
    """A folder as ``unmask rl`` leaves it."""
    folder.mkdir(parents=True)
    values = {"objective": "cj", "decoder": "ass", "seed": seed, "output_dir": str(folder), **config}
    (folder / "config.yaml").write_text(yaml.safe_dump({**values, "per_device_train_batch_size": 8}))
    (folder / "metrics.jsonl").write_text(lines(metrics(0.5 + seed / 10)))
    times = [{"step": s, "seconds_rollout": 2.0, "seconds_update": 1.0} for s in (1, 2)]
    (folder / "times.jsonl").write_text(lines(times))
    return folder


BUDGET = {"updates": 30, "completions": 1920, "training_passes": 12345}


def cell(decoder: str, solved: str, objective: str = "", seed: int | None = None, **more: Any) -> dict[str, Any]:
    """A cell of a study, of an untrained model without an ``objective``."""
    count = len(solved)
    axes = {"task": "sudoku", "decoder": decoder, "train.seed": seed}
    axes |= {"train.objective": objective or None, "train.decoder": "ass" if objective else None}
    lists = {"points": [float(c) for c in solved], "possible": [1.0] * count, "nfe": [7] * count}
    lists |= {"length": [30 + i for i in range(count)], "committed": [32] * count}
    facts = {"key": f"{decoder}-{objective}-{seed}", "score_name": "cell accuracy", "problems": "hash", "seconds": 1.5}
    facts |= {"budget": {"nfe": 7, **(BUDGET if objective else {})}, "model": {"name": "toy", "weights": "w"}}
    return {**facts, "cell": axes, "solved": solved, **lists, "environment": {"unmask": "1"}, **more}


def study(folder: Path) -> Path:
    """Cells and runs as a study leaves them, without the summary that follows from them."""
    cells = [
        cell("full", "0000000000", curves=curves()),
        cell("ass", "0100000000"),
        cell("full", "1111111110", "cj", 0, curves=curves(0.5)),
        cell("full", "1111111111", "cj", 1),
        cell("full", "1100000000", "diffu", 0),
    ]
    folder.mkdir(parents=True)
    (folder / "cells.jsonl").write_text(lines(cells), encoding="utf-8")
    train = {"train.objective": "cj", "train.decoder": "ass"}
    fixed = {"budget": BUDGET, "seconds": {"rollout": 60.0, "update": 30.0}}
    runs = [
        {"key": f"cj--seed{s}", "train": {**train, "train.seed": s}, "metrics": metrics(0.1 * s), **fixed}
        for s in (0, 1)
    ]
    (folder / "runs.jsonl").write_text(lines(runs), encoding="utf-8")
    return folder


CELLS = {"full": records(10, 9, 64), "ass": records(10, 4, 7), HOSTILE: records(10, 6, 20)}


def result(nfe: float, solved: float, label: str = "d", **more: Any) -> dict[str, Any]:
    """A row as ``figures.accuracy`` takes it."""
    shares = {"solved": solved, "solved_interval": [solved] * 2, "problems": 9}
    return {"task": "t", "label": label, "nfe": nfe, **shares, **more}
