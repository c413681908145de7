"""What a run trains on: rows of prompts, the reward functions that pay for them, and their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unmask.errors import UserError
from unmask.io.hub import load_split
from unmask.models.masked_lm import MaskedLM
from unmask.rl.config import DiffusionGRPOConfig, TrajectoryConfig
from unmask.rl.rewards import Row, reward_functions
from unmask.tasks import Task, make_task
from unmask.tasks.base import Reward
from unmask.training.sft_data import exchange, tokenize


@dataclass
class Data:
    """Rows with ``prompt`` as text to train and to validate on (none: no validation), and the rewards of a completion."""

    training: list[Row]
    validation: list[Row]
    reward_funcs: dict[str, Reward]
    weights: list[float]
    tasks: Sequence[Task] = ()

    def widest(self, lm: MaskedLM, canvas: int) -> int:
        """Tokens of the longest prompt. Raises UserError where it leaves no room for a canvas."""
        return lm.encode([row["prompt"] for row in (*self.training, *self.validation)], canvas)[0].shape[1]


def rl_data(
    lm: MaskedLM,
    config: TrajectoryConfig,
    reward_funcs: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> Data:
    """The data of a run; the arguments as ``DiffusionGRPOTrainer`` takes them. Raises UserError."""
    if isinstance(config, DiffusionGRPOConfig) and config.pairs is not None:
        if any(x is not None for x in (reward_funcs, train_dataset, eval_dataset)):
            raise UserError(
                f"pairs={config.pairs} is all that is learned from: pass no other data, and set tasks to validate"
            )
        data = task_data(lm, config) if config.tasks else Data([], [], {}, [])
        return replace(data, training=_pair_rows(lm, config.pairs, config.rollout_decoder().plan.length))
    given = (reward_funcs, train_dataset)
    rewards, source = ([v] if isinstance(v, Task | str) or callable(v) else v for v in given)
    if rewards and (isinstance(rewards[0], Task) or (isinstance(rewards[0], type) and issubclass(rewards[0], Task))):
        rewards, source = [], rewards
    source = list(config.tasks if source is None else source)
    source = [
        make_task(s, lm.task_defaults) if isinstance(s, str) else s() if isinstance(s, type) else s for s in source
    ]
    tasks = source if len(source) and isinstance(source[0], Task) else []
    if tasks:
        source = _problem_rows(lm, tasks, "train", config.problems, config.seed + 1)
        if eval_dataset is None:
            eval_dataset = _problem_rows(lm, tasks, "validation", config.validation_problems, 0)
    training = _prompt_rows(lm, source, "train")
    validation = [] if eval_dataset is None else _prompt_rows(lm, eval_dataset, "validation")
    return _paid(training, validation, rewards or config.reward_funcs, config, tasks)


def _pair_rows(lm: MaskedLM, source: str, canvas: int) -> list[Row]:
    """The token ids of each prompt and of both responses with their ends. Raises UserError with the row's place."""
    found = []
    for place, raw in load_split(source, "train", instead="the path of a local copy"):
        row: Row = {}
        for side in ("chosen", "rejected"):
            try:
                if not {"prompt", side} <= raw.keys():
                    columns = ", ".join(sorted(raw))
                    raise UserError(f"the row has the columns {columns}: rename them to prompt, chosen, rejected")
                ids = tokenize(lm, *exchange({"prompt": raw["prompt"], "completion": raw[side]}))
                if (length := len(ids["response"])) > canvas:
                    raise UserError(f"{length} tokens exceed max_completion_length {canvas}: raise it, or drop the row")
            except UserError as error:
                raise UserError(f"{place}, {side}: {str(error).replace('row.completion', f'row.{side}')}") from None
            row |= {"prompt": ids["prompt"].tolist(), side: ids["response"].tolist()}
        found.append(row)
    return found


def task_data(lm: MaskedLM, config: TrajectoryConfig) -> Data:
    """The tasks' validation problems and rewards; nothing to train on yet. Raises UserError."""
    tasks = [make_task(spec, lm.task_defaults) for spec in config.tasks]
    validation = _problem_rows(lm, tasks, "validation", config.validation_problems, 0)
    return _paid([], validation, config.reward_funcs, config, tasks)


def _paid(
    training: list[Row], validation: list[Row], rewards: Sequence[Any], config: TrajectoryConfig, tasks: Sequence[Task]
) -> Data:
    return Data(training, validation, *weighted_rewards(rewards, tasks, config.reward_weights), tasks)


def weighted_rewards(
    rewards: Sequence[Any], tasks: Sequence[Task], weights: list[float] | None
) -> tuple[dict[str, Reward], list[float]]:
    """The reward functions by name, ``rewards`` or else the tasks' own, and one weight each. Raises UserError."""
    found = reward_functions(rewards, tasks)
    if not found:
        raise UserError("no reward function: pass at least one as reward_funcs, or a task, which has its own")
    weights = weights or [weight for _, weight in found.values()]
    if len(weights) != len(found):
        raise UserError(f"{len(weights)} reward_weights for the reward functions {', '.join(found)}: set one each")
    return {name: function for name, (function, _) in found.items()}, weights


def _problem_rows(lm: MaskedLM, tasks: Sequence[Task], split: str, count: int | None, seed: int) -> list[Row]:
    """``count`` problems of every task (by default as many as the smallest has), tasks taken in turn. Raises UserError."""
    columns = []
    for task in tasks:
        problems = task.problems(split, count, seed)
        if len(problems) < (count or 1):
            raise UserError(f"task {task.name} has {len(problems)} {split} problems, not {count}: ask for fewer")
        columns.append([{"prompt": task.prompt(lm, p), "problem": p, "task": task} for p in problems])
    return [row for rows in zip(*columns, strict=False) for row in rows]


def _prompt_rows(lm: MaskedLM, rows: Sequence[Mapping[str, Any]], split: str) -> list[Row]:
    """Rows whose ``prompt`` is text; messages go through the chat template."""
    if not len(rows):
        raise UserError(f"the {split} data set is empty: set tasks, or pass a Task or at least one row")
    found = []
    for row in rows:
        if differing := row.keys() ^ rows[0].keys():
            raise UserError(f"rows of the {split} data set have different columns ({sorted(differing)}): fill all")
        prompt = row.get("prompt")
        if isinstance(prompt, list):
            prompt = lm.render(prompt)
        if not isinstance(prompt, str):
            raise UserError(f"a row of the {split} data set has the prompt {prompt!r}: write text or messages")
        found.append({**row, "prompt": prompt})
    return found
