"""Plans against method.md's numbers, and their invariants on any request."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from math import floor, log2
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask import Plan, UserError, make_decoder

IMPOSSIBLE = [
    (Plan.uniform, (0, 1), "length is 0"), (Plan.uniform, (8, 9), "choose 1 to 8"),
    (Plan.uniform, (12, 6, 5), "choose one of 1, 2, 3, 4, 6, 12"), (Plan.uniform, (8, 3, 4), "choose one of 2, 4, 6, 8"),
    (Plan.ascending, (31, 5), "in 4 ascending steps: choose 1 to 4"), (Plan.ascending, (16, 2, 8), "exclude each other"),
    (Plan.ascending, (16, 1, None, 0), "max_commit is 0: choose 1 or more"), (Plan, ((), (), ()), "is no plan"),
    (Plan, ((2, 0), (2, 2), (0.0, 1.0)), "is no plan"), (Plan, ((1, 1), (1, 3), (0.0, 1.0)), "is no plan"),
    (Plan, ((1, 1), (1, 2), (0.0, 1.5)), "is no plan"),
]  # fmt: skip


def check(plan: Plan, length: int) -> None:
    done = list(accumulate(plan.commits))
    assert min(plan.commits) >= 1
    assert done[-1] == plan.length == length == plan.horizon[-1]
    assert all(h >= d for h, d in zip(plan.horizon, done, strict=True))
    assert list(plan.horizon) == sorted(plan.horizon) and list(plan.progress) == sorted(plan.progress)
    assert 0 <= plan.progress[0] <= plan.progress[-1] <= 1


def test_ascending_as_published() -> None:
    whole, four, hybrid = Plan.ascending(128), Plan.ascending(128, blocks=4), Plan.ascending(128, block_length=32)
    assert whole.commits == four.commits == (1, 2, 4, 8, 16, 32, 65) and whole.horizon == (128,) * 7
    assert whole.progress == tuple((2 ** (s + 1) - 1) / 128 for s in range(7))
    assert Plan.ascending(256).commits == (1, 2, 4, 8, 16, 32, 64, 129)
    assert four.horizon == (15, 15, 15, 15, 31, 63, 128)  # blocks of 15, 16, 32, 65 with 4, 1, 1, 1 steps
    assert hybrid.steps == 20 and hybrid.commits == (1, 2, 4, 8, 17) * 4
    assert hybrid.horizon == (32,) * 5 + (64,) * 5 + (96,) * 5 + (128,) * 5


def test_bounded_and_uniform_commits_by_hand() -> None:
    assert Plan.ascending(128, max_commit=64).commits == (1, 2, 4, 8, 16, 32, 32, 33)
    assert Plan.ascending(128, max_commit=32).commits == (1, 2, 4, 8, 16, 24, 24, 24, 25)
    assert Plan.ascending(128, max_commit=16).commits == (1, 2, 4, 8) + (14,) * 7 + (15,)
    assert Plan.ascending(128, max_commit=1).commits == (1,) * 128
    assert Plan.ascending(128, max_commit=65) == Plan.ascending(128)  # it does not bind, so the paper's progress stays
    assert Plan.ascending(128, max_commit=64).progress[2] == 7 / 128
    assert Plan.ascending(64, block_length=32, max_commit=8).commits == (1, 2, 4, 6, 6, 6, 7) * 2
    assert Plan.ascending(128, 2, max_commit=64).horizon == (95,) * 7 + (128,)
    assert Plan.uniform(10, 4).commits == (3, 3, 2, 2)  # the remainder goes to the first steps
    assert Plan.uniform(128, 64).commits == (2,) * 64 and Plan.uniform(128, 64).progress[1] == 1 / 63
    plan = Plan.uniform(128, 64, 32)
    assert plan.horizon[15] == 32 and plan.horizon[16] == 64
    assert Plan.uniform(12, 4, 6).commits == (3, 3, 3, 3)


@given(st.integers(1, 600), st.integers(1, 600), st.data())
def test_invariants(length: int, most: int, data: st.DataObject) -> None:
    block = data.draw(st.sampled_from([d for d in range(1, length + 1) if length % d == 0]))
    steps = length // block * data.draw(st.integers(1, block))
    plan = Plan.uniform(length, steps, block)
    check(plan, length)
    assert plan.steps == steps and max(plan.commits) - min(plan.commits) <= 1
    assert all(h - d < block for d, h in zip(plan.done, plan.horizon, strict=True))  # never a step ahead of its block
    steps = max(1, floor(log2(length)))
    blocks = data.draw(st.integers(1, steps))
    ascending = Plan.ascending(length, blocks)
    check(ascending, length)
    assert ascending.commits[:-1] == tuple(2**s for s in range(steps - 1))
    assert ascending.horizon == tuple(ascending.done[max(s, steps - blocks)] for s in range(steps))
    assert ascending.progress == tuple((2 ** (s + 1) - 1) / 2**steps for s in range(steps))
    hybrid = Plan.ascending(length, block_length=block)
    check(hybrid, length)
    assert hybrid.steps == length // block * max(1, floor(log2(block)))
    bounded = Plan.ascending(length, max_commit=most)
    check(bounded, length)
    assert max(bounded.commits) <= most
    assert bounded.steps <= len([s for s in range(10) if 2**s < most]) + -(-length // most) + 1


@pytest.mark.parametrize(("make", "values", "message"), IMPOSSIBLE)
def test_impossible_plans_name_the_choices(make: Callable[..., object], values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(*values)


@pytest.mark.parametrize("spec", ["full", "semi-ar:block_length=4", "hybrid:block_length=4", "ass:max_commit=2"])
def test_long_canvases_have_plans_at_once(spec: str) -> None:
    """The start of every block as its definition says, and a canvas of 32,704 tokens in far less than a pass takes."""
    plan = make_decoder(spec, max_new_tokens=64).plan
    assert plan.start == tuple(max((g for g in plan.horizon if g < h), default=0) for h in plan.horizon)
    before = time.perf_counter()
    assert len(make_decoder(spec, max_new_tokens=32_704).plan.start) > 10
    assert time.perf_counter() - before < 1.5
