"""``lm.generate``: the same as decoding by hand, whatever the form of the prompts and the batch."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from conftest import PROMPTS
from unmask import Decoder, Generation, MaskedLM, UserError, decode, make_decoder, replay

SPEC = "eoser-ass:temperature=1"
MISTAKES: Any = [  # prompts, options, what the message says
    ([], {}, "0 prompts with num_return_sequences=1"), ("", {}, "the prompt is empty"),
    ("x", {"num_return_sequences": 2}, "all would be equal: set a temperature"), ("x", {"batch_size": 0}, "batch_size is 0"),
    ("x", {"stop": "abc"}, "stop is 'abc': pass a list"), ([{"content": "x"}], {}, "refuses the messages"),
    ("a <|mask:0|> b", {}, "gaps of 0 tokens"), ([5, 10**6], {}, "token id 1000000 lies outside the vocabulary"),
    ("a <|mask:7|> b", {"decoder": "semi-ar"}, "does not divide the canvas length 7"),
    ("a <|mask:64|> b", {"decoder": "threshold:cache=dual"}, "cache=dual needs a canvas without fixed tokens"),
    (["x", "y"], {"decoder": Decoder(max_new_tokens=8), "streamer": object()}, "a streamer shows one row"),
]  # fmt: skip


def same(a: Generation, b: Generation) -> bool:
    equal = [torch.equal(getattr(a.trajectory, k), getattr(b.trajectory, k)) for k in ("tokens", "step")]
    return a.texts == b.texts and a.nfe == b.nfe and all(equal)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_is_decoding_row_by_row(toy_lm: MaskedLM, batch_size: int) -> None:
    decoder = make_decoder(SPEC, max_new_tokens=32)
    out = toy_lm.generate(PROMPTS, decoder, seed=5, batch_size=batch_size)
    for i, prompt in enumerate(PROMPTS):
        ids, mask = toy_lm.encode([toy_lm.chat(prompt)])
        alone = decode(toy_lm, ids, mask, decoder, seeds=torch.tensor([5 + i]), early_stop=True)
        assert out.texts[i] == toy_lm.text(alone.tokens)[0] and out.nfe[i] == int(alone.nfe)
        assert torch.equal(out.trajectory.tokens[i], alone.tokens[0])
        assert torch.equal(out.trajectory.prompt[i][out.trajectory.prompt_mask[i]], ids[0])


def test_all_forms_of_a_prompt_are_one(toy_lm: MaskedLM) -> None:
    text, options = PROMPTS[0], {"max_new_tokens": 16}
    messages = [{"role": "user", "content": text}]
    whole = toy_lm.generate(text, SPEC, **options)
    for form in ([text], messages, [messages], (text,)):
        assert same(toy_lm.generate(form, SPEC, **options), whole)
    talk = [*messages, {"role": "assistant", "content": "5"}, {"role": "user", "content": "again"}]
    mixed = toy_lm.generate([talk, text], "ass", **options)
    shown = toy_lm.tokenizer.decode(mixed.trajectory.prompt[0])
    assert "again" in shown and mixed.texts[1] == toy_lm.generate(text, "ass", **options).texts[0]


def test_several_completions_stop_strings_prefill_and_streamer(toy_lm: MaskedLM) -> None:
    """Completions of one prompt are adjacent; a stop string cuts the text and leaves the tokens."""
    out = toy_lm.generate(PROMPTS[:2], SPEC, max_new_tokens=16, num_return_sequences=3, seed=7)
    one = toy_lm.generate([p for p in PROMPTS[:2] for _ in range(3)], SPEC, max_new_tokens=16, seed=7, batch_size=2)
    assert same(out, one) and len(set(out.texts[:3])) > 1
    whole = toy_lm.generate(PROMPTS[0], SPEC, max_new_tokens=32)
    text = whole.texts[0]
    assert len(text) > 4
    cut = toy_lm.generate(PROMPTS[0], SPEC, max_new_tokens=32, stop=[text[3:5], "nowhere in it"])
    assert cut.texts[0] == text[: text.index(text[3:5])] and torch.equal(cut.trajectory.tokens, whole.trajectory.tokens)
    streamer = Mock()
    out = toy_lm.generate("x", "ass", max_new_tokens=16, prefill="<reasoning>", streamer=streamer)
    assert toy_lm.tokenizer.decode(out.trajectory.prompt[0]).endswith("<reasoning>")
    assert [call[0] for call in streamer.method_calls] == ["put", *["put_draft"] * out.nfe[0], "put", "end"]
    assert same(out, toy_lm.generate("x", "ass", max_new_tokens=16, prefill="<reasoning>"))


@pytest.mark.parametrize("spec", ["semi-ar", "threshold", "hybrid", SPEC, "full:temperature=1,cfg_scale=0.5"])
def test_templates_keep_their_tokens_under_every_decoder(toy_lm: MaskedLM, spec: str) -> None:
    texts = ["one <|mask:32|> two <|mask:32|> three", "<|mask:5|> begins", "a <|mask:64|> z", PROMPTS[0]]
    decoder = make_decoder(spec, max_new_tokens=64).replace(cache="none")
    templates = [texts[0], texts[2], [{"role": "user", "content": "q"}, {"role": "assistant", "content": texts[0]}]]
    out = toy_lm.generate(templates, decoder, seed=3)
    mask = toy_lm.mask_id
    for i, template in enumerate(templates):
        one = toy_lm.generate(template, decoder, seed=3 + i)
        tokens, step = one.trajectory.tokens[0], one.trajectory.step[0]
        pieces = [" two ", " three"] if "two" in str(template) else [" z"]
        fixed = [token for piece in pieces for token in toy_lm.tokens(piece)]
        assert tokens[step < 0].tolist() == fixed and mask not in tokens
        assert (one.trajectory.state(0)[0] == mask).sum() == 64 == (step >= 0).sum()
        assert one.texts[0] == out.texts[i] and one.texts[0].startswith(("one ", "a "))
        assert (replay(toy_lm, one.trajectory) - one.trajectory.logprob).abs().max() < 1e-5
    with pytest.raises(UserError, match=r"canvases of different lengths: use \.trajectories"):
        _ = out.trajectory


def test_a_template_of_one_gap_is_a_completion(toy_lm: MaskedLM) -> None:
    plain = toy_lm.generate(PROMPTS[0], "ass", max_new_tokens=16)
    asked = toy_lm.chat(PROMPTS[0])
    ids = [*toy_lm.tokens(asked), *[toy_lm.mask_id] * 16]
    for form in (asked + "<|mask:16|>", ids, torch.tensor(ids), [ids]):
        filled = toy_lm.generate(form, "ass")
        assert filled.texts[0].startswith(asked)
        rows = zip(filled.trajectory.tokens[0], plain.trajectory.tokens[0], plain.trajectory.step[0], strict=True)
        assert all(a == b for a, b, step in rows if step >= 0)  # a completion may stop early, a template is filled
    prefilled = toy_lm.generate(PROMPTS[0], "ass", prefill="<|mask:16|>")
    assert torch.equal(prefilled.trajectory.tokens, filled.trajectory.tokens)
    assert toy_lm.generate(toy_lm.tokens(asked), "ass", max_new_tokens=16).texts == plain.texts
    assert toy_lm.generate("<|mask:4|> begins").trajectory.prompt.shape == (1, 0)


@pytest.mark.parametrize(("prompts", "options", "says"), MISTAKES)
def test_mistakes_are_one_sentence(toy_lm: MaskedLM, prompts: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        toy_lm.generate(prompts, **{"decoder": "ass", "max_new_tokens": 16, **options})
    assert "\n" not in str(error.value)
