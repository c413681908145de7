"""The loop: batch = single, replay = record, plans obeyed, sampling exact, EOS rules and nucleus by hand."""

from __future__ import annotations

import bisect
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from conftest import PROMPTS, SEEDS, logits_at, toy
from unmask import PRESETS, Decoder, MaskedLM, Trajectory, UserError, decode, make_decoder, make_task, replay
from unmask.decoding.confidence import CONFIDENCES, Confidence, exclude_eos, reject_eos, suppress_eos
from unmask.decoding.sampling import Candidates, candidates, uniform_noise
from unmask.decoding.score import forward_with_guidance
from unmask.models.head import Head

pytestmark = pytest.mark.usefixtures("no_global_randomness")

SPECS = [name for name in PRESETS if name != "rho-eos"]  # whose states have no one length
SPECS += ["full:confidence=margin", "full:confidence=entropy", "eoser:eos_tokens=eos+eot", "ass:blocks=3"]
EXTRAS = ["temperature=1", "cfg_scale=0.7", "temperature=0.7,cfg_scale=0.5"]
BATCHED = """
full-random semi-ar:block_length=8 eoser-ass llada-eval threshold:block_length=8 dream
localleap:block_length=8 less:block_length=8,threshold=0.5 credit:block_length=8 eb
"""
GREEDY = """
full semi-ar:block_length=16 eoser eoser:eos_tokens=eos+eot,gamma_min=0 ass:blocks=3 eoser-ass llada-eval hard-eos
threshold:threshold=0.3,block_length=16 full:eos=exclude,steps=7 hybrid:block_length=16 eoser:confidence=margin
full:confidence=entropy,steps=7
"""
WRONG_SPECS = [
    ("eosr", "did you mean 'eoser'"), ("full:step=3", "did you mean 'steps'"),
    ("full:steps=2.5", "choose a whole number or none"), ("full:steps=200", "choose 1 to 128"),
    ("semi-ar:block_length=30", "does not divide"), ("ass:steps=5", "drop it"),
    ("full:max_commit=8", "belongs to the ascending schedule"), ("full:temperature=nan", "choose 0 or more"),
    ("full:temperature=1e-310", "1e-9 at least above 0"),
    ("eoser:gamma_min=1.5", "choose 0 to 1"), ("full:top_p=0", "top_p of decoder 'full:top_p=0' is 0"),
    ("threshold:threshold=0", "above 0 up to 1"), ("full:confidence=low-confidnce", "did you mean 'low-confidence'"),
    ("full:eos=no", "choose from exclude, keep, reject, suppress"), ("full:steps=2,steps=3", "given twice"),
    ("full:eos=exclude,confidence=margin", "needs confidence=low-confidence, not margin"),
    ("full:cache=dual", "several blocks"), ("semi-ar:cache=dual,steps=4", "several blocks"),
    ("no/such.yaml", "cannot read the decoder file"),
]  # fmt: skip


@pytest.mark.parametrize("spec", BATCHED.split())
def test_batch_equals_single(tiny_lm: MaskedLM, spec: str) -> None:
    """Prompts of different lengths: token for token and step for step what each gives alone."""
    tasks = [make_task(name, tiny_lm.task_defaults) for name in ("sudoku", "countdown")]
    questions = [task.problems("test", 1)[0].question for task in tasks]
    prompts = [tiny_lm.chat(q) for q in (*questions, "hi", "1 + 1")]
    decoder = make_decoder(spec, max_new_tokens=16)
    ids, mask = tiny_lm.encode(prompts)
    assert len(set(mask.sum(1).tolist())) == 4
    batch = decode(tiny_lm, ids, mask, decoder, SEEDS)
    for i, prompt in enumerate(prompts):
        one = decode(tiny_lm, *tiny_lm.encode([prompt]), decoder, SEEDS[i : i + 1])
        assert torch.equal(one.tokens[0], batch.tokens[i]) and torch.equal(one.step[0], batch.step[i]), prompt
        assert torch.allclose(one.logprob[0], batch.logprob[i], atol=1e-4)


@pytest.mark.parametrize(("spec", "extra"), zip(SPECS, itertools.cycle(EXTRAS)))
def test_history(toy_lm: MaskedLM, spec: str, extra: str) -> None:
    """The plan is obeyed, the commits partition the canvas, the prompt stays, and replay equals record."""
    extra = "cfg_scale=0.7" if spec == "credit" else extra  # which is for greedy decoding
    decoder = make_decoder(f"{spec}{',' if ':' in spec else ':'}{extra}", max_new_tokens=64)
    ids, mask = toy_lm.encode(PROMPTS)
    trajectory = decode(toy_lm, ids, mask, decoder, torch.Generator().manual_seed(0))
    plan, total = decoder.plan, torch.zeros(4, 64, dtype=torch.long)
    for s in range(trajectory.steps):
        committed = trajectory.committed(s)
        total += committed
        if not decoder.adaptive:
            assert (committed.sum(1) == plan.commits[s]).all()
            assert (torch.arange(64).expand(4, -1)[committed] < plan.horizon[s]).all()
        assert torch.equal(trajectory.state(s) == toy_lm.mask_id, trajectory.step >= s)
    assert (total == 1).all() and (trajectory.tokens != toy_lm.mask_id).all() and torch.equal(trajectory.prompt, ids)
    assert torch.equal(trajectory.state(trajectory.steps), trajectory.tokens)
    if not decoder.adaptive:
        assert trajectory.nfe.tolist() == [decoder.passes] * 4
    assert (replay(toy_lm, trajectory) - trajectory.logprob).abs().max() < 1e-5


def restated(lm: MaskedLM, prompt: Tensor, spec: str, length: int) -> tuple[list[int], list[int]]:
    """One greedy row, position by position, straight from docs/decoding.md."""
    decoder = make_decoder(spec, max_new_tokens=length)
    plan = decoder.plan
    ends = lm.end_ids if decoder.eos_tokens == "eos+eot" else (lm.eos_id,)
    canvas, steps = [lm.mask_id] * length, [-1] * length
    while lm.mask_id in canvas:
        committed = length - canvas.count(lm.mask_id)
        s = bisect.bisect_right(plan.done, committed)
        x = torch.cat([prompt, torch.tensor([canvas])], 1)
        p = logits_at(lm, x, None, torch.arange(length)[None] + prompt.shape[1])[0].double().softmax(-1)
        scored = []
        for i in range(plan.horizon[s]):
            if canvas[i] != lm.mask_id:
                continue
            top = p[i].sort(descending=True).values
            token = int(p[i].argmax())
            scores = {"low-confidence": float(top[0]), "margin": float(top[0] - top[1])}
            scores["entropy"] = 1 - float(-(top * top.clamp(min=1e-300).log()).sum()) / math.log(len(top))
            score = scores[decoder.confidence]
            last = False
            if token in ends and decoder.eos == "reject":
                score *= decoder.gamma_min + (1 - decoder.gamma_min) * plan.progress[s]
            elif token in ends and decoder.eos in ("suppress", "exclude"):
                last = True
            elif decoder.eos == "exclude":  # as if the end tokens' logits were -inf
                score /= 1 - sum(float(p[i, end]) for end in ends)
            scored.append((last, -score, i, token))
        now = max(steps) + 1
        for n, (_, minus, i, token) in enumerate(sorted(scored)):
            if n < plan.done[s] - committed or -minus >= (decoder.threshold or math.inf):
                canvas[i], steps[i] = token, now
    return canvas, steps


@pytest.mark.parametrize("spec", GREEDY.split())
def test_greedy_decoding_equals_restatement(ending_lm: MaskedLM, spec: str) -> None:
    ids, mask = ending_lm.encode(PROMPTS)
    found = decode(ending_lm, ids, mask, make_decoder(spec, max_new_tokens=32))
    for i, prompt in enumerate(PROMPTS):
        expected = restated(ending_lm, ending_lm.encode([prompt])[0], spec, 32)
        assert (found.tokens[i].tolist(), found.step[i].tolist()) == expected
    assert torch.isin(found.tokens, torch.tensor(ending_lm.end_ids)).any()
    assert "threshold" not in spec or found.steps < 32  # it does save passes


def from_logits(
    logits: Tensor, temperature: float = 0.0, noise: Any = None, top_p: float = 1.0, rows: Any = None
) -> Candidates:
    """Candidates of given logits (R, V), or of some of their rows (N,): hidden states are unit vectors."""
    head = nn.utils.skip_init(nn.Linear, *logits.shape, bias=False, dtype=logits.dtype)
    with torch.no_grad():
        head.weight.copy_(logits.T.clamp(min=-1e30))
        hidden = torch.eye(len(logits), dtype=logits.dtype)[slice(None) if rows is None else rows]
        return candidates(Head.of(head, head, -1), hidden, temperature, noise, entropy=True, top_p=top_p)


def chi_square(draws: Tensor, p: Tensor) -> float:
    """p-value of the draws' counts under probabilities p, cells of expected count below 5 pooled."""
    counts = torch.stack([torch.bincount(draws, minlength=len(p)).double(), p.double() * len(draws)])
    small = counts[1] < 5
    observed, expected = torch.cat([counts[:, ~small], counts[:, small].sum(1, keepdim=True)], 1)
    keep = expected > 0
    return float(chi2.sf(((observed - expected)[keep] ** 2 / expected[keep]).sum(), int(keep.sum()) - 1))


def test_sampling_matches_softmax_and_bfloat16_would_not() -> None:
    """A flat tail under one likely token: where the reference's bfloat16 noise picks the top token every time."""
    p = torch.cat([torch.tensor([0.5]), torch.full((20_000,), 0.5 / 20_000)])
    logits, n = p.log(), 20_000
    groups = torch.cat([torch.tensor([0]), 1 + torch.arange(20_000) // 400])  # the tail in 50 cells
    q = torch.zeros(51).index_add_(0, groups, p)
    noise = uniform_noise(torch.arange(n), 0, torch.zeros(n, dtype=torch.long), 0)
    ours = from_logits(logits[None], 1.0, noise, rows=torch.zeros(n, dtype=torch.long)).tokens
    assert chi_square(groups[ours], q) > 1e-3
    uniform = torch.rand(500, len(p), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert chi_square(groups[(logits.to(torch.bfloat16) - (-uniform.log()).log()).argmax(-1)], q) < 1e-9


def test_one_step_decode_samples_the_softmax(toy_lm: MaskedLM) -> None:
    """The whole loop at T=1: one canvas token, 20,000 rows, frequencies against the model's own probabilities."""
    ids, mask = toy_lm.encode(PROMPTS[:1])
    canvas = torch.cat([ids, torch.tensor([[toy_lm.mask_id]])], 1)
    p = logits_at(toy_lm, canvas, None, torch.tensor([[ids.shape[1]]]))[0, 0].softmax(-1)
    decoder, generator = make_decoder("full:steps=1,temperature=1", max_new_tokens=1), torch.Generator().manual_seed(5)
    rows = [decode(toy_lm, ids.repeat(2000, 1), mask.repeat(2000, 1), decoder, generator) for _ in range(10)]
    draws = torch.cat([r.tokens[:, 0] for r in rows])
    assert chi_square(draws, p) > 1e-3 and (draws != toy_lm.mask_id).all()


def test_nucleus_by_hand() -> None:
    """Over an even grid of noise, tokens come as often as the cut and renormalized softmax says."""
    p, count = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1], dtype=torch.float64), 20_000
    noise, rows = (torch.arange(count, dtype=torch.float64) + 0.5) / count, torch.zeros(count, dtype=torch.long)
    cuts = [(1, 0.5, [1, 2]), (1, 0.39, [1]), (1, 0.4001, [1, 2]), (1, 0.84, [1, 2, 3]), (1, 0.99, [0, 1, 2, 3, 4])]
    for temperature, top_p, kept in (*cuts, (2, 0.55, [1, 2])):
        found = from_logits(p.log()[None], temperature, noise, top_p, rows)
        expected = torch.zeros_like(p)
        expected[kept] = p[kept] ** (1 / temperature)
        frequencies = torch.bincount(found.tokens, minlength=5).double() / count
        assert torch.allclose(frequencies, expected / expected.sum(), atol=1e-3)
        assert torch.allclose(found.logprob, p[found.tokens].log(), atol=1e-9)  # of the whole distribution


def test_noise_depends_on_the_row_alone() -> None:
    positions = torch.arange(6)[None].expand(3, -1)
    seeds = torch.tensor([[5], [6], [2**61]])
    whole = uniform_noise(seeds, 7, positions, 0)
    assert torch.equal(whole[1:2, 2:4], uniform_noise(seeds[1:2], 7, positions[1:2, 2:4], 0))
    assert not torch.equal(whole, uniform_noise(seeds, 8, positions, 0))
    assert not torch.equal(whole, uniform_noise(seeds, 7, positions, 1))
    many = uniform_noise(torch.arange(2000)[:, None], 0, torch.arange(50), 0).flatten()
    assert abs(float(many.mean()) - 0.5) < 0.005 and float(many.min()) >= 0 and float(many.max()) < 1
    assert abs(float(torch.corrcoef(torch.stack([many[:-1], many[1:]]))[0, 1])) < 0.01


def test_confidences_and_eos_rules_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    noise = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    h = -sum(share * math.log(share) for share in (0.5, 0.3, 0.2))
    expected = {"low-confidence": [0.5, 1.0, 1 / 3], "random": [0.1, 0.2, 0.3], "margin": [0.2, 1.0, 0.0]}
    expected["entropy"] = [1 - h / math.log(3), 1.0, 0.0]
    assert expected.keys() == CONFIDENCES.keys()
    for name in expected:
        score = Confidence.of(name).score(from_logits(p.log()), noise)
        assert torch.allclose(score, torch.tensor(expected[name], dtype=torch.float64), atol=1e-6)
    scores = torch.tensor([[0.9, 0.5, 0.0, 0.7]], dtype=torch.float64)
    tokens, ends = torch.tensor([[3, 1, 2, 3]]), torch.tensor([3])
    assert torch.allclose(reject_eos(scores, tokens, ends, 0.4), torch.tensor([[0.36, 0.5, 0.0, 0.28]]).double())
    hard = suppress_eos(scores, tokens, ends)
    assert 0 < hard[0, 3] < hard[0, 0] < hard[0, 2] < hard[0, 1] == 0.5  # ends below all others, in their own order
    without = exclude_eos(scores, tokens, ends, torch.tensor([[0.9, 0.25, 0.0, 0.7]], dtype=torch.float64))
    assert 0 < without[0, 3] < without[0, 0] < without[0, 2] < without[0, 1] == pytest.approx(0.5 / 0.75)
    linear, published = make_decoder("eoser"), make_decoder("eoser-ass")
    assert [linear.gamma(p) for p in (0, 1)] == [0.4, 1.0]
    assert linear.gamma(linear.plan.progress[1]) == pytest.approx(0.4 + 0.6 / 63)
    # Step 3 of L=128 under ASS: 15 of 128 tokens are committed once it is done.
    assert published.gamma(published.plan.progress[3]) == pytest.approx(0.01 + 0.99 * 15 / 128)


def test_guidance_by_hand(toy_lm: MaskedLM) -> None:
    ids, mask = toy_lm.encode(PROMPTS[:2])
    width = ids.shape[1]
    x = torch.cat([ids, torch.full((2, 4), toy_lm.mask_id)], 1)
    m = torch.cat([mask, mask.new_ones(2, 4)], 1)
    at = torch.arange(width, width + 4).expand(2, -1)
    bare = x.clone()
    bare[:, :width] = toy_lm.mask_id
    c, u = logits_at(toy_lm, x, m, at), logits_at(toy_lm, bare, m, at)
    keep = torch.arange(c.shape[-1]) != toy_lm.mask_id
    expected = (u + 2.5 * (c - u))[..., keep]
    flat = (at + torch.arange(2)[:, None] * x.shape[1]).flatten()

    def logits(head: Head, hidden: Tensor) -> Tensor:
        return torch.cat([piece for _, piece in head.pieces(hidden)], 1).view(2, 4, -1)

    found = forward_with_guidance(toy_lm, x, m, flat, logits, prompt=width, w=1.5)
    assert torch.allclose(found[..., keep], expected, atol=1e-4)
    trajectory = decode(toy_lm, ids, mask, make_decoder("ass:cfg_scale=1.5", max_new_tokens=16))
    assert trajectory.nfe.tolist() == [8, 8]


def test_trajectory_round_trip(toy_lm: MaskedLM, tmp_path: Path) -> None:
    ids, mask = toy_lm.encode(PROMPTS)
    trajectory = decode(toy_lm, ids, mask, make_decoder("eoser-ass", max_new_tokens=32))
    assert trajectory.step.dtype == torch.int16 and trajectory.logprob.dtype == torch.float32
    trajectory.save(tmp_path / "t.safetensors")
    again = Trajectory.load(tmp_path / "t.safetensors")
    for name in ("prompt", "prompt_mask", "tokens", "step", "logprob"):
        assert torch.equal(getattr(again, name), getattr(trajectory, name))
    assert (again.decoder, again.mask_id) == (trajectory.decoder, trajectory.mask_id)
    (tmp_path / "t.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a saved trajectory"):
        Trajectory.load(tmp_path / "t.safetensors")


def test_randomness_is_asked_for(toy_lm: MaskedLM) -> None:
    ids, mask = toy_lm.encode(PROMPTS)
    for spec in ("full-random", "full:temperature=1"):
        with pytest.raises(UserError, match=r"pass seeds or a torch\.Generator"):
            decode(toy_lm, ids, mask, make_decoder(spec, max_new_tokens=16))
    decoder = make_decoder("full:temperature=1", max_new_tokens=16)
    a, b = (decode(toy_lm, ids, mask, decoder, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a.tokens, b.tokens)
    with pytest.raises(UserError, match="3 seeds for 4 prompts"):
        decode(toy_lm, ids, mask, decoder, seeds=SEEDS[:3])


def test_double_precision_replays_and_logits_that_are_not_finite_are_refused() -> None:
    """NaN everywhere: no endless loop, no canvas of masks, one sentence."""
    lm, decoder = toy(), make_decoder("semi-ar:block_length=8,temperature=1", max_new_tokens=16)
    lm.model.double()
    trajectory = decode(lm, *lm.encode(PROMPTS), decoder, SEEDS)
    assert trajectory.logprob.dtype == torch.float32
    assert torch.allclose(replay(lm, trajectory), trajectory.logprob, atol=1e-6)
    lm.model.float()
    lm.model.get_output_embeddings().weight.data.fill_(torch.nan)
    specs = ("full", "threshold:block_length=8", "semi-ar:block_length=8,temperature=1", "ass:confidence=entropy")
    for spec, early_stop in zip(specs, (False, True, False, True), strict=True):
        with pytest.raises(UserError, match="logits are not finite"):
            decode(lm, *lm.encode(PROMPTS), make_decoder(spec, max_new_tokens=16), SEEDS, early_stop=early_stop)


def test_decoder_files_and_specs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: eoser-ass\nblocks: 4\ngamma_min: 0.1\n")
    from_file, from_spec = make_decoder(str(file)), make_decoder("eoser-ass:blocks=4,gamma_min=0.1")
    assert from_file.name == "mine" and from_file.replace(name="") == from_spec.replace(name="")
    assert make_decoder(f"{file}:blocks=2").blocks == 2
    assert Decoder.from_preset("eoser-ass", blocks=4, gamma_min=0.1) == from_spec
    assert Decoder.from_preset("dream", max_new_tokens=16, threshold=None).plan.commits == (1,) * 16
    assert make_decoder("dream:steps=12", max_new_tokens=24).plan.steps == 12
    assert make_decoder("full", max_new_tokens=40).plan.steps == 20
    assert make_decoder("semi-ar:block_length=8", max_new_tokens=40).plan.steps == 20


@pytest.mark.parametrize(("spec", "message"), WRONG_SPECS)
def test_wrong_decoder_specs_name_the_fix(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_decoder(spec)
