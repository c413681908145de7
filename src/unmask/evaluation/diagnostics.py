"""The EOS trap, measured: how confident the model is of EOS over the steps, and how much of what it commits is EOS."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unmask.decoding import Decoder, decode
from unmask.decoding.sampling import Candidates, candidates
from unmask.decoding.score import score_each_state
from unmask.decoding.trajectory import Trajectory
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.prompts import row_seeds, task_prompts
from unmask.models.head import Head
from unmask.models.masked_lm import MaskedLM
from unmask.tasks import Task

PROBLEMS = 64  # enough for curves; every step needs a further pass


@torch.no_grad()
def eos_curves(lm: MaskedLM, task: Task, decoder: Decoder, config: EvalConfig) -> dict[str, Any]:
    """Curves over the steps of a decode of (up to) 64 problems; confidences are the model's own, also where a cache decoded.

    Returns lists with one entry a step:
        ``eos_confidence``, ``other_confidence``: mean probability of the candidates of all still masked positions, for
            candidates that are end tokens and for the others (None where there is none).
        ``eos_share``: share of end tokens among what the step committed.
        ``length``: mean number of tokens before the first end token if the text ended at the leftmost end token committed
            so far (L where none is).
    """
    problems = task.problems(config.split, min(PROBLEMS, config.limit or PROBLEMS), config.seed)
    prompts = task_prompts(lm, task, problems, config.shots, config.seed)
    ids, mask = lm.encode(prompts, decoder.max_new_tokens)
    seeds = row_seeds(config.seed, range(len(problems))).to(ids.device)
    steps = decoder.plan.steps
    # Sums over batches: [confidence, count] of end and other candidates, [end tokens, all] of commits, [lengths, rows].
    sums = torch.zeros(steps, 4, 2, dtype=torch.float64)
    for start in range(0, len(problems), config.batch_size):
        rows = slice(start, start + config.batch_size)
        trajectory = decode(lm, ids[rows], mask[rows], decoder, seeds=seeds[rows])
        sums += _batch_sums(lm, trajectory, steps)
    share = sums[..., 0] / sums[..., 1]
    curves = {
        key: [None if math.isnan(v) else v for v in share[:, i].tolist()]
        for i, key in enumerate(("eos_confidence", "other_confidence", "eos_share", "length"))
    }
    return {"problems": len(problems), **curves}


def _batch_sums(lm: MaskedLM, trajectory: Trajectory, steps: int) -> Tensor:
    ends = torch.tensor(lm.end_ids, device=trajectory.tokens.device)
    sums = torch.zeros(steps, 4, 2, dtype=torch.float64)

    def likeliest(head: Head, hidden: Tensor, tokens: Tensor) -> Candidates:
        return candidates(head, hidden, 0.0, None)

    for s, (_, _, found) in enumerate(score_each_state(lm, trajectory, likeliest, masked=True)):
        is_end = torch.isin(found.tokens, ends)
        committed = trajectory.tokens[trajectory.committed(s)]
        for i, which in enumerate((is_end, ~is_end)):
            sums[s, i] = torch.tensor([float(found.top[which].sum()), float(which.sum())])
        sums[s, 2] = torch.tensor([float(torch.isin(committed, ends).sum()), float(len(committed))])
        sums[s, 3] = torch.tensor([float(lm.lengths(trajectory.state(s + 1)).sum()), float(len(trajectory.tokens))])
    return sums
