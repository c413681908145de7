"""Plans: how many tokens each step commits and where. Integers only; no model is needed to make or test one.

ASS (arXiv 2509.23924, section 3.2): S = floor(log2 L) steps, step s commits 2^s tokens and the last one the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from unmask.errors import UserError


@dataclass(frozen=True)
class Plan:
    """One entry a step.

    Attributes:
        commits: tokens committed (at least; a threshold may commit more). Sum = the canvas length L.
        horizon: positions below it are open to commits.
        progress: the clock in [0, 1] that EOS rejection reads.
    """

    commits: tuple[int, ...]
    horizon: tuple[int, ...]
    progress: tuple[float, ...]

    def __post_init__(self) -> None:
        done = self.done
        if not (len(self.commits) == len(self.horizon) == len(self.progress) > 0):
            raise ValueError("commits, horizon and progress must have one entry a step")
        if min(self.commits) < 1 or any(h < d for h, d in zip(self.horizon, done, strict=True)):
            raise ValueError("every step must commit at least one token inside its horizon")
        if list(self.horizon) != sorted(self.horizon) or self.horizon[-1] != done[-1]:
            raise ValueError("the horizon must grow to the canvas length")
        if list(self.progress) != sorted(self.progress) or not 0 <= self.progress[0] <= self.progress[-1] <= 1:
            raise ValueError("progress must grow within [0, 1]")

    @cached_property
    def length(self) -> int:
        return sum(self.commits)

    @property
    def steps(self) -> int:
        return len(self.commits)

    @cached_property
    def done(self) -> tuple[int, ...]:
        """Tokens committed once step s is done."""
        return tuple(accumulate(self.commits))

    @cached_property
    def open(self) -> tuple[int, ...]:
        """Masked positions below the horizon before step s."""
        return tuple(h - d + c for h, d, c in zip(self.horizon, self.done, self.commits, strict=True))

    @cached_property
    def start(self) -> tuple[int, ...]:
        """Where the block of step s begins: the horizon before it opened."""
        start = {h: earlier for earlier, h in pairwise([0, *sorted(set(self.horizon))])}
        return tuple(start[h] for h in self.horizon)

    @classmethod
    def uniform(cls, length: int, steps: int, block_length: int | None = None) -> Plan:
        """The same number of tokens every step: over the whole canvas, or block after block (semi-autoregressive).

        Progress is linear in the step, s/(S-1).

        Raises:
            UserError: for more steps than tokens, a block length that does not divide the canvas, or steps that do not
                divide over the blocks; the message lists what would do.
        """
        _check_length(length)
        block = length if block_length is None else block_length
        blocks = _check_block(length, block)
        if not 1 <= steps <= length:
            raise UserError(f"{steps} steps for a canvas of {length} tokens: give 1 to {length}")
        if steps % blocks:
            fits = ", ".join(str(blocks * k) for k in range(1, block + 1))
            raise UserError(f"{steps} steps do not divide over {blocks} blocks of {block} tokens: give one of {fits}")
        each = steps // blocks
        progress = tuple(s / (steps - 1) for s in range(steps)) if steps > 1 else (1.0,)
        return cls(
            tuple(_spread(block, each) * blocks),
            tuple((s // each + 1) * block for s in range(steps)),
            progress,
        )

    @classmethod
    def ascending(
        cls, length: int, blocks: int = 1, block_length: int | None = None, max_commit: int | None = None
    ) -> Plan:
        """Ascending step size (ASS).

        ``blocks=1`` opens the whole canvas from the start. ``blocks=b`` peels the b-1 largest commits off to the right as
        blocks of one step each: horizon[s] = done[max(s, S-b)]. ``block_length=B`` is the hybrid: blocks of B left to right,
        each filled by ascending steps. ``max_commit`` bounds what a step commits, at the price of more steps. Progress is the
        fraction committed once the step is done: (2^(s+1)-1)/2^S as in the paper, done/L in the hybrid and under a bound.

        Raises:
            UserError: for ``blocks`` outside 1 … S, both forms at once, a block length that does not divide the canvas, or a
                bound below 1.
        """
        _check_length(length)
        if max_commit is not None and max_commit < 1:
            raise UserError(f"max_commit is {max_commit}: give 1 or more, or none")
        if block_length is not None:
            if blocks != 1:
                raise UserError("blocks and block_length exclude each other in an ascending plan: give one of them")
            count = _check_block(length, block_length)
            commits = _powers(block_length, max_commit) * count
            each = len(commits) // count
            return cls(
                tuple(commits),
                tuple((s // each + 1) * block_length for s in range(len(commits))),
                tuple(d / length for d in accumulate(commits)),
            )
        commits = _powers(length, max_commit)
        steps, done = len(commits), list(accumulate(commits))
        if not 1 <= blocks <= steps:
            raise UserError(
                f"blocks is {blocks} for a canvas of {length} tokens in {steps} ascending steps: give 1 to {steps}"
            )
        bounded = commits != _powers(length, None)
        return cls(
            tuple(commits),
            tuple(done[max(s, steps - blocks)] for s in range(steps)),
            tuple(done[s] / length if bounded else (2 ** (s + 1) - 1) / 2**steps for s in range(steps)),
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _check_length(length: int) -> None:
    if length < 1:
        raise UserError(f"the canvas length is {length}: give 1 or more")


def _check_block(length: int, block_length: int) -> int:
    """The number of blocks, or a UserError that lists the lengths that fit."""
    if block_length < 1 or length % block_length:
        fits = ", ".join(map(str, _divisors(length)))
        raise UserError(f"block_length {block_length} does not divide the canvas length {length}: give one of {fits}")
    return length // block_length


def _spread(total: int, steps: int) -> list[int]:
    """``total`` over ``steps`` as evenly as integers allow, the remainder on the first steps."""
    return [total // steps + (s < total % steps) for s in range(steps)]


def _powers(length: int, most: int | None) -> list[int]:
    """1, 2, 4, … with the rest on the last of floor(log2 length) steps (one step below length 4).

    With ``most``, doubling ends below it and the rest is spread over as few steps as it allows, the larger ones last.
    """
    steps = max(1, length.bit_length() - 1)
    head = [2**s for s in range(steps - 1)]
    if most is None:
        return [*head, length - sum(head)]
    head = [p for p in head if p < most]
    rest = length - sum(head)
    return [*head, *reversed(_spread(rest, -(-rest // most)))]
