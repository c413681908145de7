"""The parts of reinforcement learning that need no trainer: advantages, weights, samplers, rewards, by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from unmask import UserError
from unmask.rl.advantages import group_advantages
from unmask.rl.objectives import View, k3, sample_views, token_weights
from unmask.rl.rewards import load_reward, score
from unmask.rl.rollout import RolloutSampler, row_seeds


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3])
    centred = group_advantages(rewards, 4, "none")
    assert torch.allclose(centred[:4], torch.tensor([0.5, -0.5, -0.5, 0.5])) and (centred[4:] == 0).all()
    std = (4 * 0.25 / 3) ** 0.5  # Bessel's correction, as in TRL
    scaled = group_advantages(rewards, 4, "group")
    assert torch.allclose(scaled[:4], centred[:4] / (std + 1e-4)) and (scaled[4:] == 0).all()


@pytest.mark.parametrize("normalization", ["step", "token", "batch"])
def test_weights_by_hand(normalization: str) -> None:
    a = torch.tensor([[True, False, False, False], [True, True, False, False]])
    b = torch.tensor([[False, True, True, True], [False, False, False, False]])
    first, second = token_weights([a, b], normalization)  # type: ignore[arg-type]
    expected = {
        "step": ([[1 / 2, 0, 0, 0], [1 / 2, 1 / 2, 0, 0]], [[0, 1 / 6, 1 / 6, 1 / 6], [0, 0, 0, 0]]),
        "token": ([[1 / 4, 0, 0, 0], [1 / 2, 1 / 2, 0, 0]], [[0, 1 / 4, 1 / 4, 1 / 4], [0, 0, 0, 0]]),
        "batch": ([[1 / 3, 0, 0, 0], [1 / 3, 1 / 3, 0, 0]], [[0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 0, 0]]),
    }[normalization]
    assert torch.allclose(first, torch.tensor(expected[0])) and torch.allclose(second, torch.tensor(expected[1]))


def test_steps_that_score_nothing_are_not_sampled() -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    empty, full = (View(ids, torch.full((2, 3), fill)) for fill in (False, True))
    for how in ("uniform", "entropy"):
        chosen = sample_views([empty, full, empty], torch.zeros(2, 3), 1, how, torch.arange(2), 0)  # type: ignore[arg-type]
        assert [bool(v.scored.all()) for v in chosen] == [False, True, False]


def test_the_largest_seed_is_a_seed() -> None:
    seeds, views = row_seeds(2**30 - 1, 10_000, 2**20, 4)
    assert len({*seeds.tolist(), *views.tolist()}) == 8


def test_k3_is_zero_on_equal_policies_and_positive_elsewhere() -> None:
    new = torch.tensor([-1.0, -2.0, -0.1])
    assert (k3(new, new) == 0).all() and (k3(new, new + torch.tensor([0.5, -0.5, 1.0])) > 0).all()
    # reference above the policy by half a nat: e^0.5 - 0.5 - 1
    assert float(k3(torch.tensor(-1.0), torch.tensor(-0.5))) == pytest.approx(0.1487213, rel=1e-5)


def test_sampler_repeats_for_inner_iterations_and_cuts_over_ranks() -> None:
    one = list(RolloutSampler(10, 4, 2, 12, seed=3))
    assert len(one) == 12 and all(one[2 * r] == one[2 * r + 1] for r in range(6))
    flat = list(itertools.chain.from_iterable(one[::2]))
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:20]
    ranks = [list(RolloutSampler(10, 2, 2, 12, 3, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one


def test_more_prompts_than_rows_repeat_over_epochs() -> None:
    assert [sorted(b) for b in RolloutSampler(2, 4, 1, 2, seed=0)] == [[0, 0, 1, 1]] * 2


def raises(prompts: Any, completions: Any, **_: Any) -> Any:
    raise ZeroDivisionError("division by zero")


def constant(value: Any) -> Any:
    def reward(prompts: Any, completions: Any, **_: Any) -> Any:
        return [value] * len(completions)

    return reward


def short(prompts: Any, completions: Any, **_: Any) -> Any:
    return [1.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "reward function raises raised ZeroDivisionError: division by zero"),
        (constant(float("nan")), "returned nan for the completion 'one': return a finite number"),
        (constant(float("inf")), "returned inf"),
        (constant("good"), "returned 'good'"),
        (constant(10**400), "returned 10000.*… for"),
        (constant(10**5000), "returned int that cannot be shown for"),
        (constant(1e300), r"returned 1e\+300"),
        (constant(torch.ones(2)), r"returned tensor\(\[1., 1.\]\)"),
        (short, "returned 1 values for 2 completions"),
        (constant(None), "every reward function .* returned None for the prompt 'a'"),
    ],
)
def test_faulty_rewards_name_the_fix(function: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score([function], [{"prompt": "a"}, {"prompt": "b"}], ["one", "two"])


def test_rewards_get_columns_and_may_abstain() -> None:
    def half(prompts: list[str], completions: list[str], kind: list[str], **_: Any) -> list[float | None]:
        return [1.0 if k == "x" else None for k in kind]

    table = score([half, constant(2)], [{"prompt": "a", "kind": "x"}, {"prompt": "b", "kind": "y"}], ["1", "2"])
    assert table[0].tolist() == [1, 2] and table[1, 0].isnan() and table[1, 1] == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "write package.module:function"),
        ("no.such:thing", "cannot be imported"),
        ("math:pi", "not a function"),
        ("fractions:Fraction", "is a class: name an object of it"),
    ],
)
def test_reward_specs(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(spec)
