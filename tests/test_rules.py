"""Rules that commit more than the plan asks for, against plain restatements: one row, one pass, one position at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import PROMPTS, SEEDS, toy, toy_that_ends
from unmask import Decoder, DiffusionGRPOConfig, MaskedLM, UserError, decode, decode_each, make_decoder, replay
from unmask.decoding.loop import DecodingLoop

L = 16
LM, ENDING = toy(), toy_that_ends(3)
RULES = {
    "eb": "eb:entropy_bound=1.5",
    "eb, by probability": "eb:entropy_bound=3,confidence=low-confidence",
    "eb in blocks": "eb:entropy_bound=2,block_length=8",
    "localleap": "localleap:block_length=8,threshold=0.3,leap_radius=2,leap_threshold=0.15",
    "less": "less:block_length=8,threshold=0.2,stable=1",
    "less, long": "less:block_length=16,threshold=0.05",
    "credit": "credit:block_length=8,threshold=0.4",
    "credit, strong": "credit:block_length=16,threshold=0.3,credit=3",
    "credit, slow": "credit:block_length=16,threshold=1,credit=5",
    "with rejection": "localleap:block_length=8,threshold=0.2,leap_threshold=0.05,eos=reject,gamma_min=0.1",
    "all": "localleap:block_length=8,threshold=0.4,leap_threshold=0.1,stable=1,credit=1,eos=reject,entropy_bound=0.5",
}


LENGTHS = [
    "rho-eos:block_length=8,threshold=0.3,initial_length=8",
    "rho-eos:block_length=16,threshold=0.2,initial_length=40",
]
LENGTHS += [
    "rho-eos:block_length=48,initial_length=24,steps=16,stable=1",
    "eoser:steps=32,initial_length=16",
]


def choice(decoder: Decoder, found: list[tuple[float, int, float]], quota: int, run: list[int]) -> set[int]:
    """The positions that a pass commits, of candidates (score, position, entropy)."""
    found = sorted(found, reverse=True)
    chosen = {i for _, i, _ in found[:quota]}
    if decoder.threshold is not None:
        anchors = [i for score, i, _ in found if score >= decoder.threshold]
        for score, i, _ in found:
            near = any(abs(i - a) <= decoder.leap_radius for a in anchors) and score >= decoder.leap_threshold
            if (i in anchors or (decoder.leap_radius and near)) and run[i] >= decoder.stable:
                chosen.add(i)
    if decoder.entropy_bound is not None:
        for count in range(1, len(found) + 1):
            entropies = [entropy for _, _, entropy in found[:count]]
            if sum(entropies) - max(entropies) <= decoder.entropy_bound:
                chosen |= {i for _, i, _ in found[:count]}
    return chosen


def restated(lm: MaskedLM, prompt: str, decoder: Decoder) -> tuple[list[int], list[int]]:
    """Tokens and steps of a greedy decode, by the rules' formulas."""
    ids, L = lm.encode([prompt])[0][0].tolist(), decoder.max_new_tokens
    canvas, steps, plan = [lm.mask_id] * L, [-1] * L, decoder.plan
    length = min(decoder.initial_length or L, L)
    credit: list[dict[int, float]] = [{} for _ in range(L)]
    last, run = [-1] * L, [0] * L
    for step in range(L):
        committed = sum(s >= 0 for s in steps)
        if min(steps[:length]) >= 0:
            break
        stage = next(i for i, done in enumerate(plan.done) if done > committed)
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids + canvas[:length]])).logits[0, len(ids) :].double()
        logits[:, lm.mask_id] = -torch.inf
        found, ends = [], []
        for i in (i for i in range(length if decoder.initial_length else plan.horizon[stage]) if steps[i] < 0):
            p = logits[i].softmax(-1)
            token = int(p.argmax())
            entropy = float(torch.special.entr(p).sum())
            run[i], last[i] = (run[i] + 1 if last[i] == token else 0), token
            if decoder.credit:
                credit[i] = {t: 0.8 * c for t, c in credit[i].items()}
                credit[i][token] = credit[i].get(token, 0.0) + float(p[token]) ** 0.2
                fused = logits[i].clone()
                for t, c in credit[i].items():
                    fused[t] += decoder.credit * math.log(1 + c)
                p = fused.softmax(-1)
                token = int(p.argmax())
            ends.append(token == lm.eos_id)
            if i >= plan.horizon[stage]:
                continue
            score = float(p[token]) if decoder.confidence == "low-confidence" else 1 - entropy / math.log(len(p))
            if decoder.eos == "reject" and token == lm.eos_id:
                score *= decoder.gamma(plan.progress[stage])
            found.append((score, i, token, entropy))
        chosen = choice(
            decoder, [(score, i, entropy) for score, i, _, entropy in found], plan.done[stage] - committed, run
        )
        for _, i, token, _ in found:
            if i in chosen:
                canvas[i], steps[i] = token, step
        if decoder.initial_length and step < 64:
            share = sum(ends) / len(ends)
            outside = max(0.4 - share, share - 0.6)
            change = 8 * 2 ** min(3, max(0, math.ceil((outside + 1e-12) / 0.1) - 1)) if outside > 0 else 0
            kept = max(i + 1 for i in range(L) if steps[i] >= 0)
            length = max(kept, min(L, length + (change if share < 0.4 else -change)))
    return canvas[:length] + [lm.eos_id] * (L - length), steps


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=8, deadline=None)
@given(prompt=st.text("abcdefgh 0123456789", min_size=1, max_size=12))
def test_rules_by_hand(name: str, prompt: str) -> None:
    if not prompt.strip():
        return
    decoder = make_decoder(RULES[name], max_new_tokens=L)
    lm = LM if decoder.eos == "keep" else ENDING
    found = decode(lm, *lm.encode([prompt]), decoder)
    assert (found.tokens[0].tolist(), found.step[0].tolist()) == restated(lm, prompt, decoder)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_choices_by_hand(name: str, data: st.DataObject) -> None:
    """Two rows of random scores, entropies and histories; thresholds that are met exactly; quotas of several tokens."""
    decoder = make_decoder(RULES[name], max_new_tokens=L)
    places = st.lists(st.integers(0, max(decoder.plan.open) - 1), min_size=1, unique=True)
    scores, entropy = torch.full((2, L), -torch.inf, dtype=torch.float64), torch.zeros(2, L, dtype=torch.float64)
    run, quotas, expected = torch.zeros(2, L, dtype=torch.int64), [], []
    for row in range(2):
        open_ = data.draw(places)
        twentieths = data.draw(st.permutations(range(21)))
        found = [(twentieths[i] / 20, i, data.draw(st.integers(0, 8)) / 4) for i in open_]
        run[row] = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=L, max_size=L)))
        for score, i, h in found:
            scores[row, i], entropy[row, i] = score, h
        quotas.append(data.draw(st.integers(1, len(open_))))
        expected.append(choice(decoder, found, quotas[-1], run[row].tolist()))
    at = (scores > -torch.inf).nonzero(as_tuple=True)
    rows: Any = SimpleNamespace(run=run)
    candidates: Any = SimpleNamespace(entropy=entropy[at])
    chosen = DecodingLoop(LM, decoder, False).choose(scores, torch.tensor(quotas), rows, at, candidates)
    assert [{*row.nonzero()[:, 0].tolist()} for row in chosen] == expected


@pytest.mark.parametrize("spec", LENGTHS)
def test_canvases_that_grow_and_shrink(spec: str) -> None:
    """As the formula says, alone and in a batch; with early stop the same text; neither trained along nor with a template."""
    lm, decoder = toy_that_ends(3), make_decoder(spec, max_new_tokens=48)
    ids = lm.encode(PROMPTS)
    found = decode(lm, *ids, decoder)
    assert len(set((found.step >= 0).sum(1).tolist())) > 1
    for i, prompt in enumerate(PROMPTS):
        assert (found.tokens[i].tolist(), found.step[i].tolist()) == restated(lm, prompt, decoder)
    assert lm.text(decode(lm, *ids, decoder, early_stop=True).tokens) == lm.text(found.tokens)
    queue = decode_each(lm, PROMPTS, decoder, SEEDS, batch_size=2, early_stop=False)
    each = {number: tokens for numbers, part in queue for number, tokens in zip(numbers, part.tokens, strict=True)}
    assert all(torch.equal(each[i], found.tokens[i]) for i in range(len(PROMPTS)))
    with pytest.raises(UserError, match="its states are not known"):
        replay(lm, found)
    with pytest.raises(UserError, match="a template has its own"):
        decode(lm, *ids, decoder, canvas=torch.full((len(PROMPTS), 48), lm.mask_id))
    with pytest.raises(UserError, match="its canvas changes length"):
        DiffusionGRPOConfig(output_dir="x", decoder=spec, max_completion_length=48)
    with pytest.raises(UserError, match="blocks of 8 tokens cannot see"):
        decode(toy(block_length=8), *ids, decoder)


@pytest.mark.parametrize("name", RULES)
def test_rules_do_something(name: str) -> None:
    """They take fewer passes than a token a pass, and not the same as the plain threshold."""
    ids = LM.encode(PROMPTS)
    found = decode(LM, *ids, make_decoder(RULES[name], max_new_tokens=L), SEEDS)
    assert int(found.nfe.min()) < L or name == "credit, slow"
    if name in ("localleap", "less", "credit, strong"):
        plain: dict[str, Any] = {"leap_radius": 0, "stable": 0, "credit": 0}
        other = decode(LM, *ids, make_decoder(RULES[name], max_new_tokens=L).replace(**plain), SEEDS)
        assert not torch.equal(found.step, other.step)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("full:leap_radius=3", "leap_radius of decoder .* qualifies its threshold, and it has none: set threshold"),
        ("full:stable=1", "stable of decoder .* qualifies its threshold"),
        ("credit:temperature=1", "credit of decoder .* is for the most likely tokens"),
        ("eb:entropy_bound=-1", "entropy_bound of decoder .* is -1.0: choose 0 or more"),
        ("rho-eos:initial_length=0", "initial_length of decoder .* is 0: choose 1 or more"),
        ("rho-eos:cache=dual", "initial_length of decoder .* changes the canvas, which no cache follows"),
        ("less:stable=-1", "stable of decoder .* is -1: choose 0 or more"),
    ],
)
def test_faulty_rules(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_decoder(spec)
