"""What supervised training learns from: worked responses of tasks, or rows of a chat data set.

Rows of tasks have prompts of like length and one canvas: prompts are padded on the left, the canvas begins in the same column.
Chat rows differ much more in length. Each gets the whole ``max_length``: prompt, response, end of turn, and EOS up to the last
column. No padding is needed, all batches have one shape, and the model learns to fill whatever canvas it is given later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from unmask.errors import UserError
from unmask.io.hub import SUFFIXES, load_split
from unmask.models.masked_lm import MaskedLM
from unmask.tasks import make_task

_REASONING = (
    "Think between <reasoning> and </reasoning>, then write only the final answer between <answer> and </answer>.\n\n"
)

Message = dict[str, str]


# ---- tasks -----------------------------------------------------------------------------------------------------------


class Examples(Dataset[dict[str, list[int]]]):
    """Tokenised prompts and responses of tasks, tasks interleaved so that any stretch holds equal shares."""

    def __init__(self, lm: MaskedLM, specs: list[str], split: str, counts: list[int], seed: int) -> None:
        end = end_token(lm)
        per_task = []
        for spec, count in zip(specs, counts, strict=True):
            task = make_task(spec, lm.task_defaults)
            problems = task.problems(split, count, seed)
            if not problems or problems[0].response is None:
                raise UserError(f"task {spec} has no worked responses to learn in this form: try style=compact")
            prompts = [task.prompt(lm, p) for p in problems]
            encode = lm.tokenizer
            per_task.append(
                [
                    {"prompt": a, "response": [*b, end]}
                    for a, b in zip(
                        encode(prompts, add_special_tokens=False)["input_ids"],
                        encode([p.response or "" for p in problems], add_special_tokens=False)["input_ids"],
                        strict=True,
                    )
                ]
            )
        self.rows = [rows[i % len(rows)] for i in range(max(counts)) for rows in per_task]
        self.prompt_width = max(len(r["prompt"]) for r in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


@dataclass
class Collate:
    """Left-padded prompts and EOS-filled responses of one width, so that a compiled model sees one shape."""

    lm: MaskedLM
    prompt_width: int
    canvas: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Returns ids (B, P+L), visible (B, P+L) bool, starts (B,): the canvas's first column, and lengths (B,) of the
        responses with their end token."""
        ids = torch.full((len(rows), self.prompt_width + self.canvas), self.lm.eos_id)
        visible = torch.ones_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            start = self.prompt_width - len(row["prompt"])
            visible[i, :start] = False
            ids[i, start : self.prompt_width] = torch.tensor(row["prompt"])
            response = row["response"][: self.canvas]
            ids[i, self.prompt_width : self.prompt_width + len(response)] = torch.tensor(response)
        starts = torch.full((len(rows),), self.prompt_width)
        return {
            "ids": ids,
            "visible": visible,
            "starts": starts,
            "lengths": torch.tensor([len(r["response"]) for r in rows]),
        }


# ---- chat ------------------------------------------------------------------------------------------------------------

Row = dict[str, np.ndarray]
"""``prompt`` and ``response`` (with its end of turn), int32 token ids."""


@dataclass(frozen=True)
class Exchange:
    """A prompt, as text or as messages for the chat template, and the response that is learned."""

    prompt: str | list[Message]
    response: str


@dataclass
class ChatRows:
    """Tokenised rows of a data set, validation rows apart; how many were cut to max_length and how many left out."""

    training: list[Row]
    validation: list[Row]
    cut: int
    left_out: int


@dataclass
class FillCollate:
    """Prompt, response, and EOS up to the last column; nothing is padding."""

    eos_id: int
    max_length: int

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """Returns ids (B, max_length), starts (B,): the column after the prompt, and lengths (B,) of the responses."""
        ids = torch.full((len(rows), self.max_length), self.eos_id)
        for i, row in enumerate(rows):
            both = np.concatenate([row["prompt"], row["response"]])
            ids[i, : len(both)] = torch.from_numpy(both)
        starts, lengths = (torch.tensor([len(r[name]) for r in rows]) for name in ("prompt", "response"))
        return {"ids": ids, "starts": starts, "lengths": lengths}


def read_chat(lm: MaskedLM, name: str, max_length: int, overlong: str, validation_share: float) -> ChatRows:
    """The rows of a data set, tokenised.

    Args:
        name: a hub data set, or a local .json, .jsonl or .parquet file or folder.
        max_length: the most tokens of prompt and response together.
        overlong: what to do with longer rows. ``truncate`` cuts the response's end; a row whose prompt alone fills
            max_length has nothing left to learn and is left out.
        validation_share: share of the different prompts (at least one) whose rows are for validation: those with the
            smallest hashes, so the choice depends neither on the order of the rows nor on the tokenizer or max_length.

    Raises:
        UserError: for a row of unknown columns or one that cannot be learned (with its place), or no row left.
    """
    exchanges, places, cut, left_out = [], [], 0, 0
    for place, raw in load_split(
        name, "train", instead=f"the path of a local copy ({', '.join(SUFFIXES)} or a folder)"
    ):
        with _of_row(place):
            exchanges.append(_exchange(raw))
        places.append(place)
    keys = [hashlib.sha256(json.dumps(e.prompt).encode()).hexdigest() for e in exchanges]
    different = sorted(set(keys))
    held = set(different[: max(1, round(validation_share * len(different)))] if validation_share else ())
    training: list[Row] = []
    validation: list[Row] = []
    for place, key, exchange in zip(places, keys, exchanges, strict=True):
        with _of_row(place):
            prompt, response = tokenised(lm, exchange)
        if len(prompt) + len(response) > max_length:
            if overlong == "refuse":
                raise UserError(
                    f"{place} has {len(prompt)} prompt and {len(response)} response tokens, together more "
                    f"than max_length {max_length}: raise it, or set overlong to truncate or drop"
                )
            if overlong == "drop" or len(prompt) >= max_length:
                left_out += 1
                continue
            response = response[: max_length - len(prompt)]
            cut += 1
        row = {"prompt": np.array(prompt, dtype=np.int32), "response": np.array(response, dtype=np.int32)}
        (validation if key in held else training).append(row)
    if not training or (held and not validation):
        raise UserError(
            f"{name} leaves {len(training)} rows to train on and {len(validation)} for validation, {left_out} are longer than "
            f"max_length {max_length}: give more rows or another max_length or validation_share"
        )
    return ChatRows(training, validation, cut, left_out)


@contextmanager
def _of_row(place: str) -> Iterator[None]:
    """Puts the row's place before a UserError of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def end_token(lm: MaskedLM) -> int:
    """What ends a response: the end-of-turn token, or EOS where there is none beside it."""
    return lm.eos_id if lm.eot_id is None else lm.eot_id


def tokenised(lm: MaskedLM, exchange: Exchange) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the response with its end of turn.

    Messages go through the chat template: the prompt is what stands before the assistant's turn, the response what the
    template writes from there to the first end token. Text is taken as it is. Each is tokenised by itself, since a
    decoder's canvas begins behind the prompt's last token.

    Raises:
        UserError: for empty text, control tokens in it, or a template that refuses the messages.
    """
    _check_text(lm, exchange)
    if isinstance(exchange.prompt, str):
        texts = [exchange.prompt, exchange.response]
    else:
        texts = _rendered(lm, exchange.prompt, exchange.response)
    prompt, response = lm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    ends = [i for i, token in enumerate(response) if token in lm.end_ids]
    return prompt, response[: ends[0] + 1] if ends else [*response, end_token(lm)]


def _check_text(lm: MaskedLM, exchange: Exchange) -> None:
    """Refuse empty text, and control tokens in what a person wrote. (A prompt given as text may hold ends of turns.)"""
    if isinstance(exchange.prompt, str):
        prompts, kept_out = [exchange.prompt], 1
    else:
        prompts, kept_out = [m["content"] for m in exchange.prompt], None
    if not exchange.response.strip() or not any(text.strip() for text in prompts):
        raise UserError(f"the {'prompt' if exchange.response.strip() else 'response'} is empty: fill or remove the row")
    controls = [str(lm.tokenizer.convert_ids_to_tokens(i)) for i in (lm.mask_id, *lm.end_ids)]
    for text, tokens in [*((p, controls[:kept_out]) for p in prompts), (exchange.response, controls)]:
        for token in tokens:
            if token in text:
                raise UserError(f"the text {text[:40]!r} holds the control token {token}: remove it")


def _rendered(lm: MaskedLM, prompt: list[Message], response: str) -> list[str]:
    """Prompt and response as the chat template writes them."""
    if lm.tokenizer.chat_template is None:
        raise UserError(f"{lm.name} has no chat template: give prompt and completion as text, or another model")
    last = {"role": "assistant", "content": response}
    before, whole = lm.render(prompt), lm.render([*prompt, last], answer=False)
    if not whole.startswith(before):
        raise UserError(
            f"the chat template of {lm.name} writes the assistant's turn otherwise than it asks for it: give prompt and "
            "completion as text"
        )
    return [before, whole.removeprefix(before)]


# ---- formats ---------------------------------------------------------------------------------------------------------


def _text(value: Any, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{what} is {type(value).__name__}: give text")
    return value or ""


def _from_messages(row: Mapping[str, Any]) -> Exchange:
    """``messages``: the last one is the assistant's and is learned, all before it are the prompt."""
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, dict) for m in messages):
        raise UserError(
            "messages are no list of two or more {role, content}: write the user's and the assistant's turn"
        )
    turns = [
        {"role": _text(m.get("role"), "a role"), "content": _text(m.get("content"), "a content")} for m in messages
    ]
    if turns[-1]["role"] != "assistant":
        raise UserError(f"the last message is by {turns[-1]['role']!r}: end with the assistant's")
    return Exchange([*turns[:-1]], turns[-1]["content"])


def _from_pair(row: Mapping[str, Any]) -> Exchange:
    """``prompt`` and ``completion`` (TRL's names): both text, or both lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        if len(completion) != 1:
            raise UserError(
                f"completion holds {len(completion)} messages: give the assistant's, and the others in prompt"
            )
        return _from_messages({"messages": [*prompt, *completion]})
    if isinstance(prompt, list) or isinstance(completion, list):
        raise UserError("one of prompt and completion is text, the other messages: write both alike")
    return Exchange(_text(prompt, "prompt"), _text(completion, "completion"))


def _from_s1k(row: Mapping[str, Any]) -> Exchange:
    """simplescaling/s1K: the first reasoning trajectory and the final answer, in tags that the user's turn asks for."""
    question, attempt = _text(row["question"], "question"), _text(row["attempt"], "attempt")
    trajectories = row["thinking_trajectories"] or [None]
    if not isinstance(trajectories, list):
        raise UserError(f"thinking_trajectories is {type(trajectories).__name__}: write a list of texts")
    trajectory = _text(trajectories[0], "thinking_trajectories")
    for name, text in (("question", question), ("thinking_trajectories", trajectory), ("attempt", attempt)):
        if not text.strip():
            raise UserError(f"{name} is empty: fill or remove the row")
    response = f"<reasoning>{trajectory}</reasoning>\n<answer>{attempt}</answer>"
    return Exchange([{"role": "user", "content": _REASONING + question}], response)


_FORMATS: list[tuple[list[str], Callable[[Mapping[str, Any]], Exchange]]] = [
    (["messages"], _from_messages),
    (["prompt", "completion"], _from_pair),
    (["question", "thinking_trajectories", "attempt"], _from_s1k),
]


def _exchange(row: Mapping[str, Any]) -> Exchange:
    """A row in the first format whose columns are all there."""
    for wanted, read in _FORMATS:
        if set(wanted) <= set(row):
            return read(row)
    known = " or ".join(" + ".join(wanted) for wanted, _ in _FORMATS)
    raise UserError(f"the row has the columns {', '.join(sorted(row)) or '(none)'}: rename them to {known}")
