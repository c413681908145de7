"""Chat data for fine-tuning: what is tokenised, what is cut or left out, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from conftest import toy
from unmask import UserError
from unmask.models.masked_lm import MaskedLM
from unmask.models.scratch import CHAT_TEMPLATE
from unmask.training.sft_data import Data, chat_data

WIDTH = 64


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def chat(tmp_path: Path, count: int = 12) -> str:
    rows = ({"messages": turns(f"say {'a' * (i % 5)}{i}", f"it is {i}" * (1 + i % 3))} for i in range(count))
    return write(tmp_path / "chat.jsonl", *rows)


def read(lm: MaskedLM, name: str, width: int = WIDTH, overlong: str = "refuse", share: float = 0.0) -> Data:
    return chat_data(lm, name, width, overlong, share)


def texts(lm: MaskedLM, rows: Data) -> list[tuple[str, str]]:
    return [(lm.tokenizer.decode(r["prompt"]), lm.tokenizer.decode(r["response"])) for r in rows.training]


HEADERS = (  # like LLaDA's: contents trimmed, a header for the answer in any case
    "{% for m in messages %}{{ '#' + m['role'] + '\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{{ '#assistant\\n' }}"
)
ENDED = (  # like Qwen's: something after the end of the turn
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|endoftext|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        (CHAT_TEMPLATE, "<|user|>1<|assistant|> 2<|eot_id|><|user|>3<|assistant|>", " 4<|eot_id|>"),
        (HEADERS, "#user\n1<|eot_id|>#assistant\n2<|eot_id|>#user\n3<|eot_id|>#assistant\n", "4<|eot_id|>"),
        (ENDED, "user:1<|endoftext|>\nassistant: 2<|endoftext|>\nuser:3<|endoftext|>\nassistant:", " 4<|endoftext|>"),
    ],
)
def test_messages_are_what_the_template_writes(tmp_path: Path, template: str, prompt: str, response: str) -> None:
    """All turns but the assistant's last are the prompt; the response ends with the template's own end of turn."""
    lm = toy()
    lm.tokenizer.chat_template = template
    (row,) = read(lm, write(tmp_path / "a.jsonl", {"messages": turns("1", " 2", "3", " 4")}), 200).training
    assert row["prompt"].tolist() == lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert row["response"].tolist() == lm.tokenizer(response, add_special_tokens=False)["input_ids"]
    assert row["response"][-1] in lm.end_ids


def test_pairs_of_text_and_of_messages(tmp_path: Path, toy_lm: MaskedLM) -> None:
    text = write(tmp_path / "text.jsonl", {"prompt": "<|user|>a<|eot_id|>b", "completion": "c"})
    assert texts(toy_lm, read(toy_lm, text)) == [
        ("<|user|>a<|eot_id|>b", "c<|eot_id|>")
    ]  # as it is, and the end of turn
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([{"prompt": turns("q"), "completion": turns("", "r")[1:], "other": 1}]))
    assert texts(toy_lm, read(toy_lm, str(file))) == [("<|user|>q<|assistant|>", "r<|eot_id|>")]


def test_s1k_rows(tmp_path: Path, toy_lm: MaskedLM) -> None:
    """Question, first trajectory and attempt in the tags that evaluation reads; the user's turn asks for them first."""
    row = {"question": "2+2?", "thinking_trajectories": ["two twos", "unused"], "attempt": "4", "cot": None}
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "train.parquet"))
    for name in (tmp_path, tmp_path / "train.parquet"):
        ((prompt, response),) = texts(toy_lm, read(toy_lm, str(name), 400))
        assert response == "<reasoning>two twos</reasoning>\n<answer>4</answer><|eot_id|>"
        assert prompt.startswith("<|user|>") and prompt.endswith("\n\n2+2?<|assistant|>")
        assert re.findall(r"</?\w+>", prompt) == ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]


def test_overlong_rows(tmp_path: Path, toy_lm: MaskedLM) -> None:
    sizes = [(4, 5), (4, 6), (10, 1)]  # the first is 10 tokens with the end of turn
    name = write(tmp_path / "a.jsonl", *({"prompt": "p" * p, "completion": "r" * r} for p, r in sizes))
    with pytest.raises(UserError, match=r"jsonl:2.*has 4 prompt and 7 response tokens.*max_length 10"):
        read(toy_lm, name, 10)
    cut = read(toy_lm, name, 10, "truncate")
    assert texts(toy_lm, cut) == [("pppp", "rrrrr<|eot_id|>"), ("pppp", "rrrrrr")]
    assert "1 of them cut to 10 tokens, 1 too long" in cut.notice  # of the third only the prompt would be left
    dropped = read(toy_lm, name, 10, "drop")
    assert texts(toy_lm, dropped) == [("pppp", "rrrrr<|eot_id|>")]
    assert "0 of them cut to 10 tokens, 2 too long" in dropped.notice
    whole = read(toy_lm, name, 12)
    assert len(whole.training) == 3 and "0 of them cut to 12 tokens, 0 too long" in whole.notice
    with pytest.raises(UserError, match=r"leaves 0 rows to train on .*3 are longer than max_length 4"):
        read(toy_lm, name, 4, "truncate")


def test_validation_prompts_are_apart(tmp_path: Path, toy_lm: MaskedLM) -> None:
    """A tenth of the different prompts, whatever the order; rows that share a prompt stay together."""
    rows = [{"prompt": f"p{i % 40}", "completion": f"r{i}"} for i in range(80)]
    found = read(toy_lm, write(tmp_path / "a.jsonl", *rows), share=0.1)
    held, learned = (
        {toy_lm.tokenizer.decode(r["prompt"]) for r in side} for side in (found.validation, found.training)
    )
    assert len(held) == 4 and len(found.validation) == 8 and not held & learned and len(found.training) == 72
    again = read(toy_lm, write(tmp_path / "b.jsonl", *rows[::-1]), share=0.1)
    assert {toy_lm.tokenizer.decode(r["prompt"]) for r in again.validation} == held
    few = write(tmp_path / "c.jsonl", *rows[:9])
    assert len(read(toy_lm, few, share=0.01).validation) == 1 and not read(toy_lm, few, share=0.0).validation


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "id": 1}, "has the columns id, text: rename them to messages or prompt .* or question"),
        ({"messages": turns("a", " ")}, "the response is empty"),
        ({"messages": turns(" ", "b")}, "the prompt is empty"),
        ({"messages": turns("a", "b", "c")}, "the last by the assistant"),
        ({"messages": turns("", "b")[1:]}, "the messages are not two or more"),
        ({"messages": None}, "the row.messages is None, not a list: repair"),
        ({"messages": turns("a<|mdm_mask|>", "b")}, r"holds the control token <\|mdm_mask\|>"),
        ({"messages": turns("a", "b<|eot_id|>c")}, r"holds the control token <\|eot_id\|>"),
        ({"messages": turns("a<|endoftext|>", "b")}, r"holds the control token <\|endoftext\|>"),
        ({"prompt": "a<|mdm_mask|>", "completion": "b"}, r"holds the control token <\|mdm_mask\|>"),
        ({"prompt": "a", "completion": 3}, "the row.completion is 3, not text or a list"),
        ({"prompt": "a", "completion": turns("", "b")[1:]}, "both text, or messages"),
        ({"prompt": turns("a"), "completion": turns("b", "c")}, "with one, the assistant's, in completion"),
        ({"question": "a", "thinking_trajectories": [], "attempt": "b"}, "one of question, .* is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, toy_lm: MaskedLM, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"jsonl:2.*{message}"):
        read(toy_lm, write(tmp_path / "a.jsonl", {**row, "messages": turns("a", "b")}, row))


def test_data_that_cannot_be_read(tmp_path: Path, toy_lm: MaskedLM) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [')
    with pytest.raises(UserError, match=r"a\.jsonl:1 is not a JSON object"):
        read(toy_lm, str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"empty has no \.json, .* file of the train split"):
        (tmp_path / "empty").mkdir()
        read(toy_lm, str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "toy has no chat template"),
        ("{{ raise_exception('no') }}", r"jsonl:1.*the chat template of toy refuses the messages \(no\)"),
        ("{{ 'a' if add_generation_prompt else 'b' }}", "otherwise than it asks for it"),
    ],
)
def test_templates_that_do_not_serve(tmp_path: Path, template: str | None, message: str) -> None:
    lm = toy()
    lm.tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        read(lm, chat(tmp_path))
