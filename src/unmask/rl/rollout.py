"""Rollouts: prompts in, a rewarded and scored batch of trajectories out, kept for all inner iterations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.decoding import Decoder, decode
from unmask.decoding.score import score_states
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM
from unmask.rl.objectives import ViewRows


@dataclass
class Rollout:
    """One batch of sampled trajectories.

    Attributes:
        trajectory: B rows, groups side by side. advantages: (B,) float32, or (B, L), each token's, where steps are paid for.
        active: (B,) bool, rows that count in the loss: those of groups whose rewards differ.
        seeds: (B,) int64, the source of what the objective's views draw.
        old, reference: (iterations, B, L) float32 log-probabilities under the sampling and the reference policy in the
            objective's views (one iteration where all share the views), (iterations, V, B, L) where the loss is of all views
            together; None where not needed.
    """

    trajectory: Trajectory
    advantages: Tensor
    active: Tensor
    seeds: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None

    def advantage(self, row: Tensor, column: Tensor) -> Tensor:
        """Of the tokens at (row, column), (N,)."""
        return self.advantages[row] if self.advantages.dim() == 1 else self.advantages[row, column]

    def save(self, folder: Path, rank: int) -> None:
        self.trajectory.save(folder / f"trajectory-{rank}.safetensors")
        tensors = {k: getattr(self, k) for k in ("advantages", "active", "seeds", "old", "reference")}
        present = {k: v.cpu().contiguous() for k, v in tensors.items() if v is not None}
        save_file(present, folder / f"rollout-{rank}.safetensors")

    @classmethod
    def load(cls, folder: Path, rank: int, device: torch.device) -> Rollout:
        """What ``save`` wrote. Raises UserError where there is none of this rank."""
        file = folder / f"rollout-{rank}.safetensors"
        if not file.is_file():
            raise UserError(f"{folder} has no rollout of process {rank}: resume with as many processes as before")
        trajectory = Trajectory.load(folder / f"trajectory-{rank}.safetensors").to(device)
        return cls(trajectory, **{k: v.to(device) for k, v in load_file(file).items()})


def rollout_batches(
    rows: int, prompts: int, iterations: int, updates: int, seed: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """This rank's ``prompts`` of the ``rows`` for every update: shuffled epochs, cut evenly over the ranks, repeated for each
    inner iteration."""
    rollouts = -(-updates // iterations)
    order = [
        torch.randperm(rows, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))
        for epoch in range(-(-rollouts * world * prompts // rows))
    ]
    batches = torch.cat(order)[: rollouts * world * prompts].view(rollouts, world, prompts)[:, rank].tolist()
    return [batches[update // iterations] for update in range(updates)]


def replacement_prompts(rows: int, prompts: int, seed: int, rollout: int, place: int) -> list[int]:
    """Which of the ``rows`` replace prompts of a rollout; ``place`` numbers the draw, another one on every rank."""
    number = (seed * 1_000_003 + rollout) * 1_000_033 + place
    return torch.randint(rows, (prompts,), generator=torch.Generator().manual_seed(number % 2**63)).tolist()


def rollout_seeds(seed: int, rollout: int, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """Seeds of decoding and of the objective's views, (rows,) int64 each; a row's depend on its place in the global batch."""
    base = ((seed * 1_000_003 + rollout) % 2**38 << 24) + 2 * (first_row + torch.arange(rows))
    return base, base + 1


def padded_width(longest: int, widest: int) -> int:
    """Columns for prompts of at most ``longest`` tokens.

    widest: 0, or of a compiled model, which is to see few shapes, the longest of all prompts: then a multiple of 64, or that.
    """
    return longest if not widest else max(longest, min(widest, -(-longest // 64) * 64))


def encode_chunks(
    lm: MaskedLM, prompts: Sequence[str], canvas: int, size: int, widest: int = 0
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """``MaskedLM.encode`` of ``size`` prompts at a time, as wide as these ask, behind which of the prompts they are."""
    for chunk in (slice(a, a + size) for a in range(0, len(prompts), size)):
        ids, mask = lm.encode(prompts[chunk], canvas, widest)
        width = padded_width(int(mask.sum(1).max()), widest)
        yield chunk, ids[:, -width:], mask[:, -width:]


def sample_trajectory(
    lm: MaskedLM, prompts: Sequence[str], decoder: Decoder, seeds: Tensor, rows_per_forward: int, widest: int = 0
) -> Trajectory:
    """Decode prompts of any lengths, at most ``rows_per_forward`` rows at a time. widest: see ``padded_width``."""
    chunks = encode_chunks(lm, prompts, decoder.max_new_tokens, rows_per_forward, widest)
    return Trajectory.cat([decode(lm, ids, mask, decoder, seeds=seeds[rows]) for rows, ids, mask in chunks])


class Scored(NamedTuple):
    """What a forward pass over view rows found, (N,) each, row by row."""

    logprob: Tensor
    """Of the scored tokens, with gradient."""
    entropy: Tensor
    at: Tensor
    """Which of the view rows."""
    row: Tensor
    """Which of the trajectory's rows."""
    column: Tensor
    """Of the canvas."""


def score_rows(
    policy: MaskedLM, trajectory: Trajectory, rows: ViewRows, targets: Tensor | None = None, widest: int = 0
) -> Scored:
    """One forward pass, as wide as its longest prompt asks (``padded_width``). The host waits for the device once.

    targets: (B, L) int64, the tokens to score; by default the trajectory's own.
    """
    lengths = trajectory.prompt_mask[rows.row].sum(1)
    longest, shortest, count = torch.stack([lengths.amax(), lengths.amin(), rows.scored.sum()]).tolist()
    width, scale = padded_width(longest, widest), trajectory.decoder["cfg_scale"]
    spare = trajectory.prompt.shape[1] - width
    at, column = torch.nonzero_static(rows.scored, size=count).unbind(1)
    row, where, ids = rows.row[at], (at, column + width), rows.ids[:, spare:]
    tokens = (trajectory.tokens if targets is None else targets)[row, column]
    clean = visible = None
    if policy.block_length is not None:  # each block of a view stands behind the blocks as they were committed
        clean = torch.cat([ids[:, :width], trajectory.tokens[rows.row]], 1)
    if shortest < width or widest:  # to a compiled model a pass without mask is another shape
        visible = trajectory.visible[rows.row, spare:]
    found = score_states(policy, ids, visible, where, tokens, prompt=width, w=scale, clean=clean)
    return Scored(*found, at, row, column)


@torch.no_grad()
def score_all(
    policy: MaskedLM,
    trajectory: Trajectory,
    rows: ViewRows,
    microbatches: Iterable[tuple[Tensor, bool]],
    widest: int = 0,
) -> Tensor:
    """Log-probabilities (V, B, L) of the recorded tokens in every view; 0 where it does not score them.

    microbatches: (indexes of view rows, whether they count), each one forward pass.
    """
    found = []
    for part, counted in microbatches:
        taken = rows.take(part)
        scored = score_rows(policy, trajectory, taken, widest=widest)
        found.append((counted, taken.view[scored.at], scored.row, scored.column, scored.logprob))
    out = found[0][-1].new_zeros(int(rows.view[-1]) + 1, *trajectory.tokens.shape)
    for counted, view, row, column, logprob in found:
        if counted:
            out[view, row, column] = logprob
    return out
