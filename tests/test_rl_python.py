"""The GRPO trainer from Python: settings that are refused, data sets, tasks, an objective of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from test_rl import ROWS, digits, trainer
from unmask import DiffusionGRPOConfig, DiffusionGRPOTrainer, UserError, make_task
from unmask.rl.objectives import OBJECTIVES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 3}, "num_generations=3 does not divide the batch of 16"),
        ({"decoder": "semi-ar:block_length=8,cache=dual"}, "samples from an approximation"),
        ({"decoder": "threshold:block_length=8", "compile": True}, "compile needs batches of one shape"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"num_generations": 1}, "num_generations is 1"),
        ({"objective": "one_step"}, "unknown objective 'one_step': did you mean 'one-step'"),
        ({"objective": "one-step", "steps_per_update": 2}, "needs objective cj"),
        ({"steps_per_update": 0}, "steps_per_update is 0"),
        ({"trainer_args": {"gradient_accumulation_steps": 2}}, "raise per_device_train_batch_size"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"lr_scheduler_type": "linea"}, "did you mean 'linear'"),
        ({"adam_beta2": 1.5}, "adam_beta2 is 1.5"),
        ({"tasks": ["sudoku", "sudoku:max_empty=4"]}, "names a task twice"),
        ({"lora_r": 0}, "lora_r is 0"),
        ({"rows": []}, "the train data set is empty"),
        ({"rows": [{"text": "x"}]}, "prompt None"),
        ({"rows": [{"prompt": "x"}, {"prompt": "y", "more": 1}]}, r"different columns \(\['more'\]\)"),
        ({"rows": [{"prompt": "x" * 2000}]}, "shorten the prompt"),
        ({"rewards": []}, "no reward function"),
        ({"reward_weights": [1.0, 2.0]}, "2 reward_weights for the reward functions digits"),
    ],
)
def test_wrong_settings_name_the_fix(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **settings)


def test_dropout_in_the_adapter_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    with pytest.raises(UserError, match=r"lora_dropout is 0\.05"):
        trainer(tmp_path, peft_config=LoraConfig(r=2, lora_dropout=0.05, target_modules=["q_proj"]))


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    t = trainer(tmp_path, rows=[{"prompt": [{"role": "user", "content": "make 5"}]}])
    assert t.train_dataset[0]["prompt"] == "<|user|>make 5<|assistant|>"


def test_a_task_is_enough(tmp_path: Path) -> None:
    """Two updates on the shipped model: a task has prompts and rewards, and is validated."""
    sizes: dict[str, Any] = {"problems": 4, "validation_problems": 2, "num_generations": 2, "max_completion_length": 16}
    sizes |= {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "report_to": []}
    task = make_task("countdown:style=compact,max_value=6", {})
    t = DiffusionGRPOTrainer("tiny", task, DiffusionGRPOConfig(output_dir=tmp_path, **sizes))
    t.train()
    assert t.state.global_step == 2 and "eval_countdown_solved" in t.state.log_history[0]
    assert "reward_countdown" in t.state.log_history[1]
    both = DiffusionGRPOTrainer("tiny", [digits, "solved"], DiffusionGRPOConfig(output_dir=tmp_path, **sizes), task)
    assert list(both.reward_funcs) == ["digits", "solved"] and len(both.train_dataset) == 4  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the train data set is empty: set tasks, or pass a Task"):
        DiffusionGRPOTrainer("tiny", digits, DiffusionGRPOConfig(output_dir=tmp_path, **sizes))


OBJECTIVE = """
from dataclasses import replace

from unmask.rl.objectives import OBJECTIVES, View, one_step


def first_half(trajectory, seeds, iteration):
    for view in one_step.views(trajectory, seeds, iteration):
        half = view.scored.clone()
        half[:, half.shape[1] // 2 :] = False
        yield replace(view, scored=half)


OBJECTIVES.register("registered-half")(first_half)
number = 3
"""


def test_an_objective_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_objective.py").write_text(OBJECTIVE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_objective:first_half", "registered-half"):
        t = trainer(tmp_path, objective=name)
        t.rollout = t.sample(ROWS)
        (view,) = t.views(t.rollout, 0)
        assert view.scored[:, :8].all() and not view.scored[:, 8:].any()
        t.update(t.model, t.rollout, 0)
        assert any(p.grad.abs().sum() > 0 for p in t.lm.model.parameters())
    monkeypatch.delitem(OBJECTIVES, "registered-half")
    with pytest.raises(UserError, match="objective 'own_objective:number' is int"):
        trainer(tmp_path, objective="own_objective:number")
    with pytest.raises(UserError, match="cannot import objective 'own_objective:nothing'"):
        trainer(tmp_path, objective="own_objective:nothing")
