"""The parts of reinforcement learning that need no trainer: advantages, weights, samplers, rewards and their names."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import UserError, make_task
from unmask.rl.objectives import group_advantages, k3, token_weights
from unmask.rl.rewards import reward_functions, score
from unmask.rl.rollout import rollout_batches


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3])
    centered = group_advantages(rewards, 4, "none")
    assert torch.allclose(centered[:4], torch.tensor([0.5, -0.5, -0.5, 0.5])) and (centered[4:] == 0).all()
    std = (4 * 0.25 / 3) ** 0.5  # Bessel's correction, as in TRL
    scaled = group_advantages(rewards, 4, "group")
    assert torch.allclose(scaled[:4], centered[:4] / (std + 1e-4)) and (scaled[4:] == 0).all()


WEIGHTS = {"step": (1 / 2, 1 / 2, 1 / 6), "grpo": (1 / 4, 1 / 2, 1 / 4), "bnpo": (1 / 3, 1 / 3, 1 / 3)}
WEIGHTS["dr_grpo"] = (1 / 4, 1 / 4, 1 / 4)  # the canvas has four tokens


@pytest.mark.parametrize("loss_type", WEIGHTS)
def test_weights_by_hand(loss_type: Any) -> None:
    """Two views of two rows: the first scores tokens of both, the second only of the first row."""
    a, b, c = WEIGHTS[loss_type]
    expected = torch.tensor([[[a, 0, 0, 0], [b, b, 0, 0]], [[0, c, c, c], [0, 0, 0, 0]]])
    assert torch.allclose(torch.stack(token_weights(list(expected > 0), loss_type)), expected)


def test_k3_is_zero_on_equal_policies_and_positive_elsewhere() -> None:
    new = torch.tensor([-1.0, -2.0, -0.1])
    assert (k3(new, new) == 0).all() and (k3(new, new + torch.tensor([0.5, -0.5, 1.0])) > 0).all()
    # reference above the policy by half a nat: e^0.5 - 0.5 - 1
    assert float(k3(torch.tensor(-1.0), torch.tensor(-0.5))) == pytest.approx(0.1487213, rel=1e-5)


def test_sampler_repeats_for_inner_iterations_and_cuts_over_ranks() -> None:
    one = rollout_batches(10, 4, 2, 12, seed=3)
    assert len(one) == 12 and all(one[2 * r] == one[2 * r + 1] for r in range(6))
    flat = list(itertools.chain.from_iterable(one[::2]))
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:20]
    ranks = [rollout_batches(10, 2, 2, 12, 3, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one
    assert [sorted(b) for b in rollout_batches(2, 4, 1, 2, seed=0)] == [[0, 0, 1, 1]] * 2  # more prompts than rows


def raises(prompts: Any, completions: Any, **_: Any) -> Any:
    raise ZeroDivisionError("division by zero")


def constant(value: Any, count: int = 2) -> Any:
    def reward(prompts: Any, completions: Any, **_: Any) -> Any:
        return [value] * count

    return reward


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "reward function raises raised ZeroDivisionError: division by zero"),
        (constant(float("nan")), "returned nan for the completion 'one': return a finite number"),
        (constant("good"), "raised ValueError: could not convert string to float: 'good'"),
        (constant(1e300), r"returned 1e\+300"),
        (constant(1.0, 1), "returned 1 values for 2 completions"),
        (constant(None), "every reward function .* returned None for the prompt 'a'"),
    ],
)
def test_faulty_rewards_name_the_fix(function: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score({function.__name__: function}, [{"prompt": "a"}, {"prompt": "b"}], ["one", "two"])


def test_rewards_get_columns_and_may_abstain() -> None:
    def half(prompts: list[str], completions: list[str], kind: list[str], **_: Any) -> list[float | None]:
        return [1.0 if k == "x" else None for k in kind]

    rows = [{"prompt": "a", "kind": "x"}, {"prompt": "b", "kind": "y"}]
    table = score({"half": half, "two": constant(2)}, rows, ["1", "2"]).table
    assert table[0].tolist() == [1, 2] and table[1, 0].isnan() and table[1, 1] == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sovled", "unknown reward 'sovled': did you mean 'solved'.* package.module:name"),
        ("no.such:thing", "cannot import"),
        ("math:pi", "is 3.14.*: name a function"),
        ("fractions:Fraction", "is <class .*or an object that is called like one"),
    ],
)
def test_reward_specs(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reward_functions([spec], [])


MODULE = """
from functools import partial


def length(prompts, completions, scale=1.0, **_):
    return [scale * len(c) for c in completions]


class Shout:
    def __call__(self, prompts, completions, **_):
        return [float(c.isupper()) for c in completions]


short, shout, nested, std = partial(length, scale=-2.0), Shout(), partial(partial(length, scale=2.0)), length
"""


def test_every_function_has_a_metric_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("named", "other"):
        (tmp_path / f"{module}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    functions = reward_functions(["named:short", "named:shout", "named:nested"], [])
    table = score({name: f for name, (f, _) in functions.items()}, [{"prompt": "a"}], ["FOUR"]).table
    assert list(functions) == ["short", "shout", "nested"] and table.tolist() == [[-8, 1, 8]]
    assert list(reward_functions(["named:length", "other:length"], [])) == ["length", "length_2"]
    assert list(reward_functions(["named:std", "solved"], [])) == ["std_2", "solved"]  # reward_std is the rollout's
    parts = [partial(constant(1), by=1), partial(constant(1), by=2), constant(1)]
    assert list(reward_functions(parts, [])) == ["reward", "reward_2", "reward_3"]
    tasks = [make_task("gsm8k", {}), make_task("math500", {})]
    assert "correct" in reward_functions([], tasks[:1])
    names = reward_functions([], tasks)
    assert list(reward_functions(["solved", "task"], tasks)) == ["solved", *names]
    assert {"gsm8k_correct", "math500_correct"} <= set(names)
    assert all(name.startswith(("gsm8k_", "math500_")) for name in names)
    small = [make_task(f"countdown:max_value={n}", {}) for n in (6, 7)]
    assert list(reward_functions([], small)) == ["countdown_countdown", "countdown_countdown_2"]
