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

    Raises UserError on construction, for what is no plan.
    """

    commits: tuple[int, ...]
    """Tokens committed (at least; a threshold may commit more). Sum = the canvas length L."""
    horizon: tuple[int, ...]
    """Positions below it are open to commits."""
    progress: tuple[float, ...]
    """Normalized decoding time in [0, 1], which EOS rejection reads."""

    def __post_init__(self) -> None:
        if not (
            len(self.commits) == len(self.horizon) == len(self.progress) > 0
            and min(self.commits) >= 1
            and all(h >= d for h, d in zip(self.horizon, self.done, strict=True))
            and all(a <= b for values in (self.horizon, self.progress) for a, b in pairwise(values))
            and self.horizon[-1] == self.length
            and 0 <= self.progress[0] <= self.progress[-1] <= 1
        ):
            entries = "commits, horizon and progress have one entry a step, each step commits 1 token or more below its horizon"
            grow = "the horizon grows to the canvas length, and progress grows within [0, 1]"
            raise UserError(f"this is no plan: {entries}, {grow}")

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

        Progress is linear in the step, s/(S-1). Raises UserError, with what would do, where lengths or steps do not divide.
        """
        count = _count_blocks(length, block_length)
        block = length // count
        if not 1 <= steps <= length:
            raise UserError(f"{steps} steps for a canvas of {length} tokens: choose 1 to {length}")
        if steps % count:
            fits = ", ".join(str(count * k) for k in range(1, block + 1))
            raise UserError(f"{steps} steps do not divide over {count} blocks of {block} tokens: choose one of {fits}")
        progress = tuple(s / (steps - 1) for s in range(steps)) if steps > 1 else (1.0,)
        return cls._repeated(_spread(block, steps // count), count, progress)

    @classmethod
    def ascending(
        cls, length: int, blocks: int = 1, block_length: int | None = None, max_commit: int | None = None
    ) -> Plan:
        """Ascending step size (ASS).

        ``blocks=1`` opens the whole canvas from the start. ``blocks=b`` peels the b-1 largest commits off to the right as
        blocks of one step each: horizon[s] = done[max(s, S-b)]. ``block_length=B`` is the hybrid: blocks of B left to right,
        each filled by ascending steps. ``max_commit`` bounds what a step commits, at the price of more steps. Progress is the
        fraction committed once the step is done: (2^(s+1)-1)/2^S as in the paper, done/L in the hybrid and under a bound.
        Raises UserError for both forms at once, and what is out of range.
        """
        if max_commit is not None and max_commit < 1:
            raise UserError(f"max_commit is {max_commit}: choose 1 or more, or none")
        count = _count_blocks(length, block_length)
        commits = _powers(length // count, max_commit)
        done = list(accumulate(commits * count))
        if block_length is not None:
            if blocks != 1:
                raise UserError("blocks and block_length exclude each other in an ascending plan: use one of them")
            return cls._repeated(commits, count, tuple(d / length for d in done))
        steps = len(commits)
        if not 1 <= blocks <= steps:
            canvas = f"a canvas of {length} tokens in {steps} ascending steps"
            raise UserError(f"blocks is {blocks} for {canvas}: choose 1 to {steps}")
        horizon = tuple(done[max(s, steps - blocks)] for s in range(steps))
        progress = tuple(d / length for d in done)
        if commits == _powers(length, None):
            progress = tuple((2 ** (s + 1) - 1) / 2**steps for s in range(steps))
        return cls(tuple(commits), horizon, progress)

    @classmethod
    def _repeated(cls, commits: list[int], count: int, progress: tuple[float, ...]) -> Plan:
        """Blocks from left to right, each filled by the same commits."""
        block = sum(commits)
        return cls(tuple(commits * count), tuple(block * (i + 1) for i in range(count) for _ in commits), progress)


def divisors(n: int) -> str:
    """All divisors of a number, for a message."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _count_blocks(length: int, block_length: int | None) -> int:
    if length < 1:
        raise UserError(f"the canvas length is {length}: choose 1 or more")
    if block_length is None:
        return 1
    if block_length < 1 or length % block_length:
        fault = f"block_length {block_length} does not divide the canvas length {length}"
        raise UserError(f"{fault}: choose one of {divisors(length)}")
    return length // block_length


def _spread(total: int, steps: int) -> list[int]:
    """``total`` over ``steps`` as evenly as integers allow, the remainder on the first steps."""
    return [total // steps + (s < total % steps) for s in range(steps)]


def _powers(length: int, most: int | None) -> list[int]:
    """1, 2, 4, … with the rest on the last of floor(log2 length) steps (one step below length 4).

    With ``most``, doubling ends below it and the rest is spread over as few steps as it allows, the larger ones last.
    """
    head = [2**s for s in range(max(1, length.bit_length() - 1) - 1)]
    if most is None:
        return [*head, length - sum(head)]
    head = [p for p in head if p < most]
    rest = length - sum(head)
    return [*head, *reversed(_spread(rest, -(-rest // most)))]
