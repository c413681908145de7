"""``python -m benchmarks gap``: how far the policy that an objective optimizes is from the policy that sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import write_result
from benchmarks.config import BenchGap
from unmask.decoding import make_decoder
from unmask.evaluation.evaluate import task_prompts
from unmask.models.load import load
from unmask.results.statistics import pooled_bootstrap
from unmask.rl.objectives import ViewRows, find_objective
from unmask.rl.rollout import rollout_seeds, sample_trajectory, score_all
from unmask.tasks import make_task


def run(config: BenchGap, progress: Callable[[str], None]) -> dict[str, Any]:
    """Sample with each decoder, score the same trajectories by each objective; writes and returns the result.

    Every entry of ``cells`` has the mean over all tokens that the objective's views score (``gap``) and over those up to the
    first end token (``text_gap``), each with a 95 % interval (bootstrap over completions).
    """
    lm = load(config.model)
    cells = []
    for spec in config.task:
        task = make_task(spec, lm.task_defaults)
        problems = task.problems("train", config.limit, config.seed + 1)
        prompts = task_prompts(lm, task, problems)
        for decoder_spec in config.decoder:
            progress(f"{spec} · {decoder_spec}")
            decoder = make_decoder(decoder_spec, max_new_tokens=config.max_new_tokens, temperature=config.temperature)
            seeds, view_seeds = rollout_seeds(config.seed, 0, 0, len(prompts))
            trajectory = sample_trajectory(lm, prompts, decoder, seeds, config.rows_per_forward)
            inside = torch.arange(config.max_new_tokens) <= lm.lengths(trajectory.tokens)[:, None]
            for name in config.objective:
                gaps = torch.zeros_like(trajectory.logprob, dtype=torch.float64)
                scored = torch.zeros_like(gaps)
                for view in find_objective(name).all_views(trajectory, view_seeds, 0, inside.sum(1)):
                    rows = ViewRows.of([view])
                    parts = [(p, True) for p in rows.scored.any(1).nonzero()[:, 0].split(config.rows_per_forward)]
                    found = score_all(lm, trajectory, rows, parts)[0]
                    gaps += view.scored * (found - trajectory.logprob).abs()
                    scored += view.scored
                cell: dict[str, Any] = {"task": spec, "decoder": decoder_spec, "objective": name}
                cell["completions"] = len(gaps)
                for key, counted in (("gap", torch.ones_like(inside)), ("text_gap", inside)):
                    sums, tokens = (gaps * counted).sum(1).tolist(), (scored * counted).sum(1).tolist()
                    cell[key] = sum(sums) / sum(tokens)
                    cell[f"{key}_interval"] = list(pooled_bootstrap(sums, tokens))
                cells.append(cell)
    return write_result(config, cells)


def table(config: BenchGap, result: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
    """Title, and text by heading for each cell."""

    def shown(cell: dict[str, Any], key: str) -> str:
        return "{:.2g} [{:.2g}, {:.2g}]".format(cell[key], *cell[f"{key}_interval"])

    rows = [
        {key: c[key] for key in ("task", "decoder", "objective")}
        | {"all tokens": shown(c, "gap"), "up to the first end token": shown(c, "text_gap")}
        for c in result["cells"]
    ]
    title = f"log-prob mismatch, nats a token, {config.limit} completions, T = {config.temperature:g} [95 %]"
    return title, rows
