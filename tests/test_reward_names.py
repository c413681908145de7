"""Every reward function of a run has a metric of its own, in the run and in its plan."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from unmask.io.files import read_lines
from unmask.rl.dry_run import dry_run
from unmask.rl.rewards import reward_names, task_rewards
from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.run import train
from unmask.tasks import make_task

MODULE = """
from functools import partial


def length(prompts, completions, scale=1.0, **_):
    return [scale * len(c) for c in completions]


class Shout:
    __slots__ = ()

    def __call__(self, prompts, completions, **_):
        return [float(c.isupper()) for c in completions]


long, short, shout, quiet = partial(length), partial(length, scale=-2.0), Shout(), Shout()
nested, std, given = partial(partial(length, scale=2.0)), length, lambda prompts, completions, **_: [0.5] * len(prompts)
"""


@pytest.mark.parametrize(
    ("reward", "names"),
    [
        (["named:length"], ["length"]),
        (["named:long", "named:short"], ["long", "short"]),
        (["named:shout", "named:quiet", "named:nested", "named:given"], ["shout", "quiet", "nested", "given"]),
        (["named:length", "other:length"], ["named.length", "other.length"]),
        (["named:length", "named:length"], ["length", "length_2"]),
        (["named:std", "named:length"], ["std_2", "length"]),  # reward_std is the rollout's
    ],
)
def test_metrics_of_named_functions(
    reward: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_folder: str
) -> None:
    for module in ("named", "other"):
        (tmp_path / f"{module}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings: dict[str, Any] = {"problems": 2, "validation_problems": 1, "num_generations": 2, "per_device_train_batch_size": 2}
    settings |= {
        "max_completion_length": 4,
        "max_steps": 1,
        "eval_steps": 1,
        "save_steps": 1,
        "report_to": [],
        "bf16": False,
    }
    c = DiffusionGRPOConfig(output="run", tasks=["sudoku:style=compact"], model=toy_folder, reward_funcs=reward, **settings)
    assert f"rewards    {', '.join(names)}\n" in dry_run(c)
    train(c)
    line = next(e for e in read_lines(tmp_path / "run" / "metrics.jsonl") if "reward" in e)
    found = {k.removeprefix("reward_"): v for k, v in line.items() if k.startswith("reward_")}
    assert list(found) == ["std", *names]
    if names == ["long", "short"]:
        assert found["short"] == -2 * found["long"] and line["reward"] == pytest.approx(-found["long"])


def test_rewards_of_tasks_and_of_callables_are_told_apart() -> None:
    one, two = make_task("gsm8k", {}), make_task("math500", {})
    assert "correct" in reward_names([f for f, _ in task_rewards([one])])
    names = reward_names([f for f, _ in task_rewards([one, two])])
    assert len(set(names)) == len(names) and {"gsm8k_correct", "math500_correct"} <= set(names)
    assert all(name.startswith(("gsm8k_", "math500_")) for name in names)
    gym = [make_task(f"reasoning_gym:leg_counting,max_animals={n}", {}) for n in (3, 4)]
    assert len(set(reward_names([f for f, _ in task_rewards(gym)]))) == 2

    def scaled(prompts: Any, completions: Any, by: float, **_: Any) -> Any:
        return [by] * len(completions)

    assert reward_names([partial(scaled, by=1), partial(scaled, by=2), scaled]) == ["scaled", "scaled_2", "scaled_3"]
