"""What supervised training learns from: worked responses of tasks, or rows of a chat data set.

Rows of tasks have prompts of like length and one canvas: prompts are padded on the left, the canvas begins in the same column.
Chat rows differ much more in length. Each gets the whole width: prompt, response, end of turn, and EOS up to the last column.
No padding is needed, all batches have one shape, and the model learns to fill whatever canvas it is given later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.io.hub import SUFFIXES, load_split
from unmask.io.schema import check
from unmask.models.masked_lm import MaskedLM
from unmask.tasks import Task
from unmask.training.config import LONGEST, SFTConfig

_REASONING = (
    "Think between <reasoning> and </reasoning>, then write only the final answer between <answer> and </answer>."
)
_TURNS = [{"role": str, "content": (str, None)}]
_FORMATS: tuple[dict[str, Any], ...] = (
    {"messages": _TURNS},
    {"prompt": (str, _TURNS), "completion": (str, _TURNS)},
    {"question": str, "thinking_trajectories": (str, [str]), "attempt": str},  # simplescaling/s1K
)
"""Columns of chat data and what they hold (``io/schema.py``)."""

Prompt = str | list[dict[str, str]]
"""Text, or messages for the chat template."""
Row = dict[str, np.ndarray]
"""``prompt`` and ``response`` (with its end of turn), int32 token ids."""


@dataclass
class Collate:
    """Rows of one width, so that a compiled model sees one shape: prompt, response, and EOS up to the last column.

    With a ``prompt_width``, prompts are padded on the left up to it, and every response begins in that column.
    """

    eos_id: int
    width: int
    prompt_width: int = 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """ids (B, width); starts (B,): each row's first column after the prompt; lengths (B,) of the responses; with a
        prompt_width also visible (B, width) bool, False on padding."""
        ids = torch.full((len(rows), self.width), self.eos_id)
        prompts, lengths = (torch.tensor([len(row[name]) for row in rows]) for name in ("prompt", "response"))
        starts = torch.full_like(prompts, self.prompt_width) if self.prompt_width else prompts
        for row, line, begin in zip(rows, ids, (starts - prompts).tolist(), strict=True):
            both = np.concatenate([row["prompt"], row["response"]])
            line[begin : begin + len(both)] = torch.from_numpy(both)
        batch = {"ids": ids, "starts": starts, "lengths": lengths}
        if self.prompt_width:
            batch["visible"] = torch.arange(self.width)[None] >= (starts - prompts)[:, None]
        return batch


@dataclass
class Data:
    """Rows to train and to validate on, their collator, the lengths that canvases are cut to in turn, and a line to say."""

    training: list[Row]
    validation: list[Row]
    collate: Collate
    canvases: list[int]
    notice: str = ""


def task_data(lm: MaskedLM, tasks: Sequence[Task], config: SFTConfig) -> Data:
    """Worked responses of tasks, interleaved so that any stretch holds equal shares.

    Raises:
        UserError: for a task without worked responses, or where they do not fit the canvas or the model.
    """

    def rows(split: str, counts: Sequence[int], seed: int) -> list[Row]:
        per_task = []
        for task, count in zip(tasks, counts, strict=True):
            problems = task.problems(split, count, seed)
            if not problems or problems[0].response is None:
                raise UserError(f"task {task.name} has no worked responses to learn in this form: try style=compact")
            per_task.append([tokenize(lm, task.prompt(lm, p), p.response or "") for p in problems])
        return [rows[i % len(rows)] for i in range(max(counts)) for rows in per_task]

    problems, canvas = config.problems, max(config.canvas)
    if len(problems) not in (1, len(tasks)):
        raise UserError(f"problems is {problems}: set one number, or one for each of the {len(tasks)} tasks")
    training = rows("train", problems if len(problems) == len(tasks) else problems * len(tasks), config.seed)
    validation = rows("validation", [config.validation_problems] * len(tasks), 0)
    if (longest := max(len(row["response"]) for row in training)) > canvas:
        raise UserError(f"the longest response has {longest} tokens: raise canvas {config.canvas} to hold it")
    width = max(len(row["prompt"]) for row in (*training, *validation))
    if width + canvas > lm.max_length:
        raise UserError(f"prompts of {width} tokens and a canvas of {canvas} exceed the model's {lm.max_length}")
    return Data(training, validation, Collate(lm.eos_id, width + canvas, width), config.canvas)


def chat_data(
    lm: MaskedLM, source: str | Iterable[Mapping[str, Any]], max_length: int | None, overlong: str, share: float
) -> Data:
    """The rows of a data set, tokenized.

    Args:
        source: a hub data set, a local .json, .jsonl or .parquet file or folder, or the rows themselves.
        max_length: the most tokens of prompt and response together, and then every row's width; by default the longest row's.
        overlong: what to do with longer rows. ``truncate`` cuts the response's end; a row whose prompt alone fills
            max_length has nothing left to learn and is left out.
        share: share of the different prompts (at least one) whose rows are for validation: those with the smallest hashes,
            so the choice depends neither on the order of the rows nor on the tokenizer or max_length.

    Raises:
        UserError: for a row of unknown columns or one that cannot be learned (with its place), or no row left.
    """
    if max_length is not None and max_length > lm.max_length:
        raise UserError(f"max_length is {max_length}, but {lm.name} takes {lm.max_length} tokens: lower it")
    limit = max_length or min(LONGEST, lm.max_length)
    if isinstance(source, str):
        name, suffixes = source, ", ".join(SUFFIXES)
        places = load_split(source, "train", instead=f"the path of a local copy ({suffixes} or a folder)")
    else:
        name, places = "the data set", ((f"row {number}", dict(row)) for number, row in enumerate(source, 1))
    rows: list[tuple[str, Row]] = []
    keys: set[str] = set()
    cut = left_out = 0
    for place, raw in places:
        try:
            prompt, response = exchange(raw)
            row = tokenize(lm, prompt, response)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        keys.add(key := hashlib.sha256(json.dumps(prompt).encode()).hexdigest())
        start, length = len(row["prompt"]), len(row["response"])
        if start + length > limit:
            if overlong == "refuse":
                raise UserError(
                    f"{place} has {start} prompt and {length} response tokens, together more than max_length {limit}: raise "
                    "it, or set overlong to truncate or drop"
                )
            if overlong == "drop" or start >= limit:
                left_out += 1
                continue
            row["response"] = row["response"][: limit - start]
            cut += 1
        rows.append((key, row))
    held = set(sorted(keys)[: max(1, round(share * len(keys)))]) if share else set()
    training, validation = ([row for key, row in rows if (key in held) == side] for side in (False, True))
    if not training or (held and not validation):
        raise UserError(
            f"{name} leaves {len(training)} rows to train on and {len(validation)} for validation, {left_out} are longer than "
            f"max_length {limit}: use more rows, or another max_length or validation_share"
        )
    width = max_length or max(len(row["prompt"]) + len(row["response"]) for _, row in rows)
    notice = (
        f"{name}: {len(training)} training and {len(validation)} validation rows, {cut} of them cut to {width} tokens, "
        f"{left_out} too long and left out"
    )
    return Data(training, validation, Collate(lm.eos_id, width), [width], notice)


def tokenize(lm: MaskedLM, prompt: Prompt, response: str) -> Row:
    """Token ids of the prompt and of the response with its end of turn (EOS where the model has no other end).

    Messages go through the chat template: the prompt is what it writes before the assistant's turn, the response what it
    writes from there to the first end token. Text is taken as it is. Each is tokenized by itself, since a decoder's canvas
    begins behind the prompt's last token.

    Raises:
        UserError: for empty text, control tokens in it, or a template that refuses the messages.
    """
    controls = lm.tokenizer.convert_ids_to_tokens([lm.mask_id, *lm.end_ids])
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if not response.strip() or not any(text.strip() for text in texts):
        raise UserError(f"the {'prompt' if response.strip() else 'response'} is empty: fill or remove the row")
    for number, text in enumerate((*texts, response)):
        forbidden = controls[:1] if number == 0 and isinstance(prompt, str) else controls  # there ends of turns may be
        if found := [token for token in forbidden if token in text]:
            raise UserError(f"the text {text[:40]!r} holds the control token {found[0]}: remove it")
    if isinstance(prompt, list):
        if lm.tokenizer.chat_template is None:
            raise UserError(
                f"{lm.name} has no chat template: write prompt and completion as text, or use another model"
            )
        before = lm.render(prompt)
        whole = lm.render([*prompt, {"role": "assistant", "content": response}], answer=False)
        if not whole.startswith(before):
            raise UserError(
                f"the chat template of {lm.name} writes the assistant's turn otherwise than it asks for it: write prompt and "
                "completion as text"
            )
        prompt, response = before, whole.removeprefix(before)
    ids, learned = lm.tokenizer([prompt, response], add_special_tokens=False)["input_ids"]
    learned.append(lm.eos_id if lm.eot_id is None else lm.eot_id)
    end = next(i for i, token in enumerate(learned) if token in lm.end_ids)
    return {"prompt": np.array(ids, dtype=np.int32), "response": np.array(learned[: end + 1], dtype=np.int32)}


def exchange(row: Mapping[str, Any]) -> tuple[Prompt, str]:
    """Prompt and response of a row, in the first format whose columns are all there."""
    columns = next((columns for columns in _FORMATS if columns.keys() <= row.keys()), None)
    if columns is None:
        formats = " or ".join(" + ".join(columns) for columns in _FORMATS)
        raise UserError(f"the row has the columns {', '.join(sorted(row)) or '(none)'}: rename them to {formats}")
    values = {name: row[name] for name in columns}
    try:
        check(values, columns, "the row")
    except ValueError as error:
        raise UserError(f"{error}: repair or remove the row") from None
    if "question" in values:  # the first trajectory, in tags that the user's turn asks for
        question, reasoning, answer = values.values()
        reasoning = "".join(reasoning[:1]) if isinstance(reasoning, list) else reasoning
        if not (question.strip() and reasoning.strip() and answer.strip()):
            raise UserError(f"one of {', '.join(columns)} is empty: fill or remove the row")
        response = f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"
        return [{"role": "user", "content": f"{_REASONING}\n\n{question}"}], response
    prompt: Any = values.get("prompt", [])
    completion: Any = values.get("completion", values.get("messages"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(prompt, str) or isinstance(completion, str) or ("completion" in values and len(completion) != 1):
        raise UserError(
            "prompt and completion are to be both text, or messages with one, the assistant's, in completion"
        )
    turns = [{"role": m["role"], "content": m["content"] or ""} for m in (*prompt, *completion)]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise UserError(
            "the messages are not two or more, the last by the assistant: write the user's turn and its answer"
        )
    return turns[:-1], turns[-1]["content"]
