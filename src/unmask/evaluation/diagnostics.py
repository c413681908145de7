"""The EOS trap, measured: how confident the model is of EOS over the steps, and how much of what it commits is EOS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from unmask.decoding import Decoder, decode
from unmask.decoding.decode import guided_logits
from unmask.models.masked_lm import MaskedLM
from unmask.tasks import Task

if TYPE_CHECKING:
    from unmask.evaluation.evaluate import EvalConfig

PROBLEMS = 64  # enough for curves; every step needs a further pass


@torch.no_grad()
def eos_curves(lm: MaskedLM, task: Task, decoder: Decoder, config: EvalConfig) -> dict[str, Any]:
    """Curves over the steps of a decode of (up to) 64 problems.

    Returns lists with one entry a step:
        ``eos_confidence``, ``other_confidence``: mean probability of the candidates of all still masked positions, for
            candidates that are EOS and for the others (None where there is none).
        ``eos_share``: share of end tokens among what the step committed.
        ``length``: mean number of tokens before the first end token if the text ended at the leftmost end token committed
            so far (L where none is).
    """
    problems = task.problems(config.split, min(PROBLEMS, config.limit or PROBLEMS), config.seed)
    ids, mask = lm.encode([lm.chat(task.instruction(p), task.prefill) for p in problems], decoder.max_new_tokens)
    seeds = torch.arange(len(problems), device=ids.device) + config.seed * 2**32
    trajectory = decode(lm, ids, mask, decoder, seeds=seeds)
    batch, length = trajectory.tokens.shape
    width = ids.shape[1]
    visible = torch.cat([mask, mask.new_ones(batch, length)], dim=1)
    every = torch.arange(length, device=ids.device)[None].expand(batch, -1) + width
    ends = torch.tensor(lm.end_ids, device=ids.device)
    curves: dict[str, list[float | None]] = {
        k: [] for k in ("eos_confidence", "other_confidence", "eos_share", "length")
    }
    for s in range(trajectory.steps):
        state = trajectory.state(s)
        logits = guided_logits(lm, torch.cat([ids, state], 1), visible, every, width, decoder.cfg_scale)
        confidence, candidate = logits.softmax(-1).max(-1)
        masked, is_eos = state == lm.mask_id, candidate == lm.eos_id
        for key, which in (("eos_confidence", masked & is_eos), ("other_confidence", masked & ~is_eos)):
            curves[key].append(float(confidence[which].mean()) if which.any() else None)
        committed = trajectory.committed(s)
        curves["eos_share"].append(float(torch.isin(trajectory.tokens[committed], ends).float().mean()))
        curves["length"].append(float(lm.lengths(trajectory.state(s + 1)).float().mean()))
    return {"problems": len(problems), "nfe": float(trajectory.nfe.float().mean()), **curves}
