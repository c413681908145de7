"""What is fast must be the same: early stop, full batches, caches, vocabulary passes, no waiting for the device."""

from __future__ import annotations

import itertools
from unittest.mock import create_autospec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from conftest import PROMPTS, SEEDS, toy
from unmask import MaskedLM, Trajectory, UserError, decode, decode_each, make_decoder, replay
from unmask.decoding.canvas import Canvases
from unmask.decoding.loop import DecodingLoop
from unmask.decoding.sampling import candidates
from unmask.models import head as head_module
from unmask.models.backbone import KVCache
from unmask.models.head import Head, score_tokens, token_logprob

pytestmark = pytest.mark.usefixtures("no_global_randomness")

CACHED = ["semi-ar:cache=dual", "threshold:cache=prefix,threshold=0.3", "hybrid:cache=dual,cfg_scale=0.5"]
RULES = ["localleap:threshold=0.3,leap_threshold=0.1", "less:threshold=0.1,stable=1", "credit:threshold=0.4"]
CACHED += ["less:threshold=0.1,stable=1,cache=dual", "credit:threshold=0.4,cache=prefix"]
STATIC = ["full-random:temperature=1", "ass:confidence=entropy,cfg_scale=1", "semi-ar:cache=dual,block_length=16"]
NINE = [PROMPTS[i % 4] + "abc"[i // 4] for i in range(9)]
STOPPED = ["semi-ar", "hybrid", "threshold", "dream", "semi-ar:temperature=1,cfg_scale=0.5", "eoser:eos_tokens=eos+eot"]
STOPPED += [*RULES, "eb:entropy_bound=2"]
BATCHED = ["full-random", "semi-ar", "threshold", "full:temperature=1", *RULES, "eb:entropy_bound=2", *CACHED]
WINDOWS = ["ass:blocks=3,cache=prefix", "threshold:threshold=0.2,cache=dual", "semi-ar:cfg_scale=0.5,cache=dual"]


def once(lm: MaskedLM, spec: str, **how: object) -> Trajectory:
    ids, mask = lm.encode(PROMPTS)
    return decode(lm, ids, mask, make_decoder(spec, max_new_tokens=64), seeds=SEEDS, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", STOPPED)
def test_early_stop_keeps_the_text_and_the_history(ending_lm: MaskedLM, spec: str) -> None:
    whole, short = once(ending_lm, spec), once(ending_lm, spec, early_stop=True)
    assert ending_lm.text(whole.tokens) == ending_lm.text(short.tokens)
    done = short.step >= 0
    assert torch.equal(short.tokens[done], whole.tokens[done]) and torch.equal(short.step[done], whole.step[done])
    assert torch.allclose(short.logprob[done], whole.logprob[done], atol=1e-4)
    assert (short.tokens[~done] == ending_lm.mask_id).all()
    if spec == "semi-ar":
        assert int(short.nfe.sum()) < 0.5 * int(whole.nfe.sum())
    # A row stops in the pass that completes its text, not later: the first with an end token and nothing masked before it.
    ends = torch.isin(whole.tokens, torch.tensor(ending_lm.end_ids))
    for row, step in enumerate(whole.step.tolist()):
        last = [max(step[: at + 1]) for at in ends[row].nonzero().flatten().tolist()]
        assert int(short.nfe[row]) == (min(last, default=max(step)) + 1) * (2 if "cfg" in spec else 1)


@pytest.mark.parametrize(("spec", "static"), zip(BATCHED, itertools.cycle([True, False])))
def test_a_full_batch_gives_what_each_prompt_gives_alone(ending_lm: MaskedLM, spec: str, static: bool) -> None:
    decoder = make_decoder(spec, max_new_tokens=64 if "cache" in spec else 32)
    seeds = torch.arange(9) + 5
    width = max(len(p) for p in NINE) + 4 if static else 0
    found = list(decode_each(ending_lm, NINE, decoder, seeds, batch_size=4, static_width=width))
    assert sorted(itertools.chain.from_iterable(numbers for numbers, _ in found)) == list(range(9))
    for numbers, trajectory in found:
        texts = ending_lm.text(trajectory.tokens)
        for i, number in enumerate(numbers):
            ids, mask = ending_lm.encode([NINE[number]])
            alone = decode(ending_lm, ids, mask, decoder, seeds=seeds[number : number + 1], early_stop=True)
            assert texts[i] == ending_lm.text(alone.tokens)[0] and torch.equal(trajectory.step[i], alone.step[0])
            assert torch.allclose(trajectory.logprob[i], alone.logprob[0], atol=1e-4)
            assert torch.equal(trajectory.prompt[i][trajectory.prompt_mask[i]], ids[0])


def test_the_batch_is_kept_full(ending_lm: MaskedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine prompts in a batch of three take about a third of the passes of one row at a time."""
    sizes = []
    advance = DecodingLoop.advance
    monkeypatch.setattr(DecodingLoop, "advance", lambda self, rows: (sizes.append(len(rows)), advance(self, rows))[1])
    decoder = make_decoder("semi-ar", max_new_tokens=64)
    found = list(decode_each(ending_lm, NINE, decoder, torch.arange(9), 3))
    total = sum(int(t.nfe.sum()) for _, t in found)
    tail = next(i for i in range(len(sizes)) if all(n < 3 for n in sizes[i:]))
    assert sum(sizes) == total and set(sizes[:tail]) == {3}
    for seeds, batch_size, says in ((torch.arange(9), 0, "batch_size is"), (torch.arange(8), 4, "8 seeds for 9")):
        with pytest.raises(UserError, match=says):
            list(decode_each(ending_lm, NINE, decoder, seeds, batch_size))


def test_a_cache_with_new_tokens_in_its_window_is_refreshed_there(toy_lm: MaskedLM) -> None:
    """Tokens changed inside the window only: the window over the whole row is the full pass, a smaller one is not."""
    ids, mask = toy_lm.encode(PROMPTS)
    cache = KVCache(ids.shape[1])
    toy_lm.model.model(ids, mask, cache=cache)
    edited = ids.clone()
    edited[:, 30:35] = ids[0, -5:]
    full = toy_lm.model.model(edited, mask).last_hidden_state[:, 30:35]
    part = toy_lm.model.model(edited, mask, cache=cache, window=torch.arange(30, 35)[None]).last_hidden_state
    assert (part - full).abs().max() > 1e-3  # the columns around it still saw the old tokens
    entire = toy_lm.model.model(edited, mask, cache=cache, window=torch.arange(ids.shape[1])[None]).last_hidden_state[
        :, 30:35
    ]
    assert torch.allclose(entire, full, atol=1e-4)


@pytest.mark.parametrize("spec", WINDOWS)
def test_cached_decoding_computes_only_its_window(toy_lm: MaskedLM, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    forward = type(toy_lm.model.model).forward
    watched = create_autospec(forward, side_effect=forward)
    monkeypatch.setattr(type(toy_lm.model.model), "forward", watched)
    cached = once(toy_lm, spec)
    windows = [call.args[-2] for call in watched.call_args_list]
    windows = [None if w is None else (int(w[0, 0]), int(w[0, -1]) + 1) for w in windows]
    assert (cached.tokens != toy_lm.mask_id).all()
    plan, width = make_decoder(spec, max_new_tokens=64).plan, cached.prompt.shape[1]
    stops = plan.horizon if "dual" in spec else [64] * plan.steps
    blocks = {(width + start, width + stop) for start, stop in zip(plan.start, stops, strict=True)}
    assert windows.count(None) == len(blocks)  # one full pass a block
    assert {w for w in windows if w is not None} <= blocks and len(windows) > len(blocks)
    if "threshold" not in spec:
        assert len(windows) == plan.steps
        exact = once(toy_lm, spec.rsplit(",", 1)[0])  # the first pass of the first block is
        assert torch.equal(cached.tokens[cached.step == 0], exact.tokens[exact.step == 0])


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, *weight.T.shape, bias=False)
    linear.weight.data.copy_(weight)
    return linear


@pytest.mark.parametrize(("vocabulary", "pieces"), [(3, (5, 64 * 5)), (64, (7, 64 * 20)), (1000, (7, 64 * 20))])
def test_pieces_equal_the_whole(vocabulary: int, pieces: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates, statistics, samples, scores and gradients against plain formulas, for any cut of rows and vocabulary."""
    monkeypatch.setattr(head_module, "CPU_CHUNK", pieces)
    g = torch.Generator().manual_seed(vocabulary)
    linear = linear_of(torch.randn(vocabulary, 6, generator=g))
    hidden = (3 * torch.randn(23, 6, generator=g)).requires_grad_()
    tokens = torch.randint(1, vocabulary, (23,), generator=g)
    noise = torch.rand(23, generator=g, dtype=torch.float64)
    upstream = torch.randn(23, generator=g)

    logits = linear(hidden).masked_fill(torch.arange(vocabulary) == 0, -torch.inf)  # token 0 is the mask
    p = logits.detach().double().softmax(-1)
    for head in (Head.of(linear, linear, 0), Head(linear.forward, 0, None)):
        with torch.no_grad():
            also = torch.stack([tokens, tokens.flip(0)], 1)
            found = candidates(head, hidden, 0.0, None, entropy=True, also=also)
        best = p.topk(2).values
        assert torch.equal(found.tokens, p.argmax(-1))
        assert torch.allclose(found.logprob.double(), best[:, 0].log(), atol=1e-6)
        assert torch.allclose(torch.stack([found.top, found.second], 1), best, atol=1e-6)  # type: ignore[list-item]
        assert torch.allclose(found.entropy, torch.special.entr(p).sum(-1), atol=1e-5)  # type: ignore[arg-type]
        assert found.most is not None and found.most.exp().allclose(torch.tensor(float(vocabulary)).double())
        assert torch.allclose(found.also, p.log().gather(1, also), atol=1e-5)  # type: ignore[arg-type]
        for temperature in (1.0, 0.6, 3.0):
            with torch.no_grad():
                drawn = candidates(head, hidden, temperature, noise)
            cdf = (logits.detach().double() / temperature).softmax(-1).cumsum(-1)
            assert torch.equal(drawn.tokens, torch.searchsorted(cdf, noise[:, None], right=True)[:, 0])
            assert torch.allclose(drawn.logprob.double(), p.gather(1, drawn.tokens[:, None])[:, 0].log(), atol=1e-5)

        linear.weight.grad = hidden.grad = None
        logprob, entropy = score_tokens(head, hidden, tokens)
        (logprob * upstream).sum().backward()
        ours = [hidden.grad.clone(), linear.weight.grad.clone()]  # type: ignore[attr-defined]
        linear.weight.grad = hidden.grad = None
        plain = linear(hidden).masked_fill(torch.arange(vocabulary) == 0, -torch.inf).log_softmax(-1)
        plain = plain.gather(1, tokens[:, None])[:, 0]
        (plain * upstream).sum().backward()
        assert torch.allclose(logprob, plain, atol=1e-5)
        assert torch.allclose(entropy.double(), torch.special.entr(p).sum(-1), atol=1e-5)
        for found, expected in zip(ours, (hidden.grad, linear.weight.grad), strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


def test_scores_keep_their_order_near_certainty() -> None:
    """Probabilities that round to 1: the log-probability still tells them apart."""
    linear = linear_of(torch.tensor([[0.0], [1.0], [0.05]]))
    with torch.no_grad():
        hidden = torch.tensor([[25.0], [26.0], [60.0]])
        head = Head.of(linear, linear, -1)
        odds = (hidden.double() @ linear.weight.T.double()).diff(dim=1).abs().neg().exp()  # 0 and 0.05 against 1
        expected = -(odds[:, 0] + odds[:, 1]).log1p()
        ones, whole = torch.ones(3).long(), Head(linear.forward, -1, None)
        scores = [score_tokens(h, hidden, ones)[0] for h in (head, whole)]
        for found in (candidates(head, hidden, 0.0, None).logprob, *scores):
            assert torch.allclose(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_adapted_heads_are_called_whole(tied: bool) -> None:
    """A LoRA on the head, or a trained copy of a tied embedding: replay equals record, and the head gets its gradient."""
    lm = toy(weight_tying=tied)
    ids, mask = lm.encode(PROMPTS)
    untied = {"target_modules": r"model\.transformer\.ff_out"}
    adapter = LoraConfig(r=2, **({"target_modules": ["q_proj"], "modules_to_save": ["wte"]} if tied else untied))
    with torch.random.fork_rng():
        lm.model = get_peft_model(lm.model, adapter)
    trajectory = decode(lm, ids, mask, make_decoder("ass:temperature=1", max_new_tokens=16), seeds=SEEDS)
    assert torch.allclose(replay(lm, trajectory), trajectory.logprob, atol=1e-5)
    row = torch.cat([ids, trajectory.state(0)], 1)[-1:]
    last = torch.arange(row.numel())[-16:]
    found, _ = lm.forward_head(row, None, last, lambda head, hidden: score_tokens(head, hidden, trajectory.tokens[-1]))
    found.sum().backward()
    grads = [p.grad for n, p in lm.model.named_parameters() if ("modules_to_save" if tied else "lora_B") in n]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)


def test_autocast_scores_in_its_precision() -> None:
    """Under autocast the products are bfloat16, as the model's own; gradients come back in the weights' precision."""
    g = torch.Generator().manual_seed(0)
    linear = linear_of(torch.randn(300, 16, generator=g))
    hidden, tokens = torch.randn(9, 16, generator=g), torch.randint(1, 300, (9,), generator=g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = score_tokens(Head.of(linear, linear, 0), hidden, tokens)
        plain = token_logprob(linear(hidden).float().index_fill(1, torch.tensor([0]), -torch.inf), tokens)
    assert torch.allclose(found, plain, atol=1e-5)
    found.sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("spec", STATIC)
def test_the_loop_never_waits_for_the_device(spec: str) -> None:
    """On tensors without values, whatever must look at one raises: so would a synchronisation."""
    decoder = make_decoder(spec, max_new_tokens=32)
    prompt = torch.zeros(3, 5, dtype=torch.int64)
    rows = Canvases.new(prompt, prompt > 0, torch.full((3, 32), toy().mask_id), toy().mask_id, prompt[:, 0], range(3))
    with FakeTensorMode() as mode:
        lm = toy()
        for name in ("ids", "visible", "rank", "step", "logprob", "seeds", "at"):
            setattr(rows, name, mode.from_tensor(getattr(rows, name)))
        loop = DecodingLoop(lm, decoder, early_stop=False)
        for _ in range(decoder.plan.steps):
            loop.advance(rows)
        assert loop.finished(rows) == [0, 1, 2]
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            DecodingLoop(lm, make_decoder("threshold", max_new_tokens=32), False).advance(rows)
