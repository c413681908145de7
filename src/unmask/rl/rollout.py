"""Rollouts: prompts in, a rewarded and scored batch of trajectories out, kept for all inner iterations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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


def sample_trajectory(
    lm: MaskedLM, prompts: list[str], decoder: Decoder, seeds: Tensor, rows_per_forward: int, width: int = 0
) -> Trajectory:
    """Decode prompts of any lengths (padded to ``width`` at least), at most ``rows_per_forward`` rows at a time."""
    ids, mask = lm.encode(prompts, decoder.max_new_tokens, width)
    seeds = seeds.to(ids.device)
    chunks = zip(*(x.split(rows_per_forward) for x in (ids, mask, seeds)), strict=True)
    return Trajectory.cat([decode(lm, i, m, decoder, seeds=s) for i, m, s in chunks])


def score_rows(
    policy: MaskedLM, trajectory: Trajectory, rows: ViewRows, targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One forward pass: log-probabilities (with gradient), entropies, rows and columns of the scored tokens, (N,) each.

    targets: (B, L) int64, the tokens to score; by default the trajectory's own.
    """
    width, scale = trajectory.prompt.shape[1], trajectory.decoder["cfg_scale"]
    at, column = rows.scored.nonzero(as_tuple=True)
    row, where = rows.row[at], (at, column + width)
    tokens = (trajectory.tokens if targets is None else targets)[row, column]
    clean = None
    if policy.block_length is not None:  # each block of a view stands behind the blocks as they were committed
        clean = torch.cat([rows.ids[:, :width], trajectory.tokens[rows.row]], 1)
    visible = trajectory.visible[rows.row]
    found = score_states(policy, rows.ids, visible, where, tokens, prompt=width, w=scale, clean=clean)
    return *found, row, column


@torch.no_grad()
def score_all(
    policy: MaskedLM, trajectory: Trajectory, rows: ViewRows, microbatches: Iterable[tuple[Tensor, bool]]
) -> Tensor:
    """Log-probabilities (V, B, L) of the recorded tokens in every view; 0 where it does not score them.

    microbatches: (indexes of view rows, whether they count), each one forward pass.
    """
    found = []
    for part, counted in microbatches:
        taken = rows.take(part)
        logprob, _, row, column = score_rows(policy, trajectory, taken)
        found.append((counted, taken.view[taken.scored.nonzero()[:, 0]], row, column, logprob))
    out = found[0][-1].new_zeros(int(rows.view[-1]) + 1, *trajectory.tokens.shape)
    for counted, view, row, column, logprob in found:
        if counted:
            out[view, row, column] = logprob
    return out
