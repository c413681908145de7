"""Block-causal models: each token sees its own block and those before it; blocks are counted from a row's first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from checkpoints import WRITERS
from conftest import PROMPTS, SEEDS, toy
from unmask.decoding import Decoder, decode, decode_each, make_decoder, replay
from unmask.decoding.score import score_states
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.backbone import FLEX
from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.rl.objectives import OBJECTIVES, ViewRows, find_objective
from unmask.rl.rollout import score_rows
from unmask.tasks import make_task
from unmask.training.config import SFTConfig
from unmask.training.sft import SFTTrainer

B, L = 8, 32
DECODERS = [
    "full",
    "eoser",
    "semi-ar:block_length=4",
    "threshold:threshold=0.3",
    "ass",
    "eoser-ass",
    "hybrid",
    "full:steps=8",
]
DECODERS += ["less:threshold=0.2,stable=1,block_length=8", "credit:threshold=0.4,block_length=8", "eb:entropy_bound=2"]
DECODERS += ["dream", "full-random", "ass:max_commit=2", "eoser-ass:cfg_scale=1.5"]


@pytest.fixture(scope="module", params=["own", "next"])
def block_lm(request: pytest.FixtureRequest) -> MaskedLM:
    """A toy with blocks, whose hidden states predict their own position or the next."""
    lm = toy(block_length=B)
    lm.model.shifted = request.param == "next"  # type: ignore[assignment]
    return lm


def decoded(lm: MaskedLM, spec: str, prompts: list[str] = PROMPTS, **how: Any) -> Trajectory:
    ids, mask = lm.encode(prompts)
    return decode(lm, ids, mask, make_decoder(spec, max_new_tokens=L), SEEDS[: len(prompts)], **how)


def test_a_block_sees_itself_and_what_is_before_it(block_lm: MaskedLM) -> None:
    """Cut behind a block, a row gives that block's logits; a row of one block is a row under full attention."""
    full = toy()
    full.model.shifted = block_lm.model.shifted
    ids = block_lm.encode([PROMPTS[3]])[0]
    whole = block_lm.model(ids).logits
    for end in (B, 2 * B, 5 * B):
        cut = block_lm.model(ids[:, :end]).logits
        assert torch.allclose(whole[:, :end], cut, atol=1e-5)
        assert not torch.allclose(whole[:, : end - 2], block_lm.model(ids[:, : end - 2]).logits, atol=1e-3)
    assert torch.allclose(full.model(ids[:, :B]).logits, block_lm.model(ids[:, :B]).logits, atol=1e-5)
    padded, mask = block_lm.encode([PROMPTS[3], *PROMPTS], width=ids.shape[1] + 3)  # the grid starts at the first token
    assert torch.allclose(block_lm.model(padded, mask).logits[0, 3:], whole[0], atol=1e-5)


@pytest.mark.parametrize("spec", DECODERS)
def test_exact_cache(block_lm: MaskedLM, spec: str) -> None:
    """Cached = uncached, batch = single, rows that join and leave = rows in one batch, replay = record."""
    cached, plain = (decoded(block_lm, f"{spec}{',' if ':' in spec else ':'}cache={c}") for c in ("exact", "none"))
    assert cached.decoder["cache"] == "exact" and torch.equal(decoded(block_lm, spec).tokens, cached.tokens)
    assert torch.equal(cached.tokens, plain.tokens) and torch.equal(cached.step, plain.step)
    assert torch.allclose(cached.logprob, plain.logprob, atol=2e-5)
    assert torch.allclose(replay(block_lm, cached), cached.logprob, atol=2e-5)
    decoder = make_decoder(spec, max_new_tokens=L)
    for early_stop in (False, True):
        joined = decode_each(block_lm, [*PROMPTS, *PROMPTS], decoder, SEEDS.repeat(2), 3, early_stop)
        for numbers, part in joined:
            for i, number in enumerate(numbers):
                committed = part.step[i] >= 0
                assert torch.equal(part.tokens[i][committed], cached.tokens[number % 4][committed])
                assert early_stop or bool(committed.all())


def test_blocks_are_filled_in_turn_from_the_prompts_last(block_lm: MaskedLM) -> None:
    for spec in DECODERS:
        found = decoded(block_lm, spec)
        for row in range(len(PROMPTS)):
            begun = int(found.prompt_mask[row].sum()) % B
            block = (torch.arange(L) + begun) // B
            first, last = (
                torch.stack([getattr(found.step[row][block == b], end)() for b in range(int(block[-1]) + 1)])
                for end in ("min", "max")
            )
            assert (first[1:] == last[:-1] + 1).all()  # no pass commits in two blocks, none commits nothing
    ascending = decoded(block_lm, "ass", ["x" * 8])
    assert torch.bincount(ascending.step[0].int()).tolist() == [1, 2, 5] * 4
    inside = decoded(block_lm, "ass", ["x" * 6])  # six prompt tokens are committed in the first block
    assert torch.bincount(inside.step[0].int()).tolist() == [2, *[1, 2, 5] * 3, 1, 2, 3]


PARENTS = {
    "sdar": "Qwen3",
    "sdar-moe": "Qwen3Moe",
    "a2d-bd3lm": "Qwen3",
    "fast-dllm": "Qwen2",
    "llada2": "Glm4Moe",
    "llada-moe": "Qwen3Moe",
    "diffcoder": "Llama",
    "illada": "Llama",
}


@pytest.mark.parametrize("name", PARENTS)
def test_logits_are_those_of_transformers_own_class(name: str, tmp_path: Path) -> None:
    """In float64, padded and not, under a dense mask made by hand; routers and norms of LLaDA2 and SDAR are in float32."""
    lm = load(WRITERS[name](tmp_path), "float32")
    model = lm.model.double()
    own = getattr(transformers, f"{PARENTS[name]}ForCausalLM")(model.config).double().eval()
    own.load_state_dict(model.state_dict())
    ids, mask = lm.encode(["hello there in an " * 3, "an in", "hello"])
    place = (mask.long().cumsum(1) - 1).clamp(min=0)
    block = place // (lm.block_length or 10_000)
    seen = (block[:, :, None] >= block[:, None, :]) & mask[:, None, :] | torch.eye(ids.shape[1], dtype=torch.bool)
    dense = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)[:, None]
    with torch.no_grad():
        theirs, ours = own(ids, attention_mask=dense, position_ids=place).logits, lm.model(ids, mask).logits
        alone = lm.model(ids[:1]).logits
    if name == "fast-dllm":
        theirs = torch.cat([theirs[:, :1], theirs[:, :-1]], 1)
        mask[:, 1:] &= mask[:, :-1]  # a row's first token has none before it
    assert float((theirs - ours)[mask].abs().max()) < 1e-5 and float((alone - ours[:1]).abs().max()) < 1e-5


def test_self_test_where_rounding_chooses_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding may send a few tokens to other experts; all of them, or any in a model without experts, is a fault."""
    dense, experts = toy(block_length=B), load(WRITERS["llada2"](tmp_path), "float32")
    for lm, changed, fine in ((experts, 5, True), (experts, 60, False), (dense, 5, False)):
        forward = type(lm.model).forward

        def padded(model: Any, *args: Any, changed: int = changed, forward: Any = forward, **how: Any) -> Any:
            out = forward(model, *args, **how)
            if how["attention_mask"] is not None:
                out.logits[:changed] *= 2
            return out

        with monkeypatch.context() as patch:
            patch.setattr(type(lm.model), "forward", padded)
            if fine:
                assert lm.self_test()["padding"] < 1e-3
            else:
                with pytest.raises(UserError, match="left padding changes its logits"):
                    lm.self_test()


def gradient(lm: MaskedLM, loss: Tensor) -> Tensor:
    lm.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in lm.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("spec", ["full", "full:steps=32", "threshold:threshold=0.3", "ass", "eoser-ass:cfg_scale=1.5"])
def test_parallel_replay_is_sequential_replay(block_lm: MaskedLM, spec: str) -> None:
    """Step k of every block in one pass: log-probabilities and gradient of ``cj`` as state by state, in at most B passes."""
    found = decoded(block_lm, spec)
    coefficient, width = (
        torch.randn(found.tokens.shape, generator=torch.Generator().manual_seed(0)),
        found.prompt.shape[1],
    )
    loss = torch.zeros(())
    for s in range(found.steps):
        row, column = found.committed(s).nonzero(as_tuple=True)
        ids, at = torch.cat([found.prompt, found.state(s)], 1), (row, column + width)
        how: dict[str, Any] = {"prompt": width, "w": found.decoder["cfg_scale"]}
        logprob, _ = score_states(block_lm, ids, found.visible, at, found.tokens[row, column], **how)
        loss = loss + (logprob * coefficient[row, column]).sum()
    sequential = gradient(block_lm, loss)
    views = list(OBJECTIVES["cj"].views(found.by_block(B), SEEDS, 0))
    assert len(views) <= B < found.steps
    logprob, _, _, row, column = score_rows(block_lm, found, ViewRows.of(views))
    assert len(row) == found.tokens.numel()
    assert torch.allclose(logprob, found.logprob[row, column], atol=2e-5)
    parallel = gradient(block_lm, (logprob * coefficient[row, column]).sum())
    assert float((parallel - sequential).abs().max() / sequential.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["one-step", "diffu", "coupled", "tracerl:merge=2", "espo", "spg:block_length=8"])
def test_views_are_scored_block_by_block(block_lm: MaskedLM, name: str) -> None:
    """Each token as in a row of its own: the finished blocks before its block, then that block as the view has it."""
    found, lengths = decoded(block_lm, "full"), torch.full((len(PROMPTS),), L)
    rows = ViewRows.of(find_objective(name).all_views(found.by_block(B), SEEDS, 0, lengths))
    logprob, _, at, row, column = score_rows(block_lm, found, rows)
    width = found.prompt.shape[1]
    for i in range(0, len(row), 11):
        padding = int((~found.prompt_mask[row[i]]).sum())
        view, place = rows.ids[at[i], padding:], width - padding + int(column[i])
        finished = torch.cat([view[: width - padding], found.tokens[row[i]]])
        start = place // B * B
        ids = torch.cat([finished[:start], view[start : start + B]])
        logits = block_lm.model(ids[None]).logits[0, place].detach()
        logits[block_lm.mask_id] = -torch.inf
        assert float(logits.log_softmax(-1)[found.tokens[row[i], column[i]]]) == pytest.approx(
            float(logprob[i]), abs=2e-5
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["toy", "sdar"])
def test_flex_attention_is_the_dense_mask(name: str, tmp_path: Path) -> None:
    """Padded rows and one alone; forward only, as FlexAttention has no backward on the CPU, which training refuses."""
    lm = toy(block_length=B) if name == "toy" else load(WRITERS[name](tmp_path / name), "float32")
    for prompts in (PROMPTS, PROMPTS[:1]):
        found = decoded(lm, "full", prompts)
        rows = ViewRows.of(list(OBJECTIVES["cj"].views(found.by_block(lm.block_length), SEEDS[: len(prompts)], 0)))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            lm.model.config._attn_implementation = "sdpa"
            dense = score_rows(lm, found, rows)[0]
            lm.model.config._attn_implementation = FLEX
            flex = score_rows(lm, found, rows)[0]
            assert torch.equal(decoded(lm, "full", prompts).tokens, found.tokens)
        assert torch.allclose(flex, dense, atol=2e-5) and not torch.equal(flex, dense)
    for model, says in ((lm, "is for a GPU: set sdpa or eager"), (toy(), "is for block-causal models")):
        with pytest.raises(UserError, match=f"flex_attention {says}"):
            config = SFTConfig(
                output_dir=str(tmp_path / "run"), problems=[64], max_steps=1, attn_implementation="flex_attention"
            )
            SFTTrainer(model, config, make_task("countdown", {"countdown": {"style": "compact", "max_value": 9}}))


def test_supervised_loss_by_hand(tmp_path: Path) -> None:
    """Every block behind the clean ones before it, each with a masking time of its own."""
    lm = toy(block_length=B)
    task = make_task("countdown", {"countdown": {"style": "compact", "max_value": 9}})
    config = SFTConfig(
        output_dir=str(tmp_path / "run"),
        model="toy",
        problems=[4],
        canvas=[128],
        per_device_train_batch_size=4,
        max_steps=1,
    )
    trainer = SFTTrainer(lm, config, task)
    rows: Any = trainer.train_dataset
    batch = trainer.data_collator(rows[:4])
    ids, width, begin = batch["ids"], batch["ids"].shape[1], trainer.prompt_width
    t = torch.rand(4, -(-width // B), generator=torch.Generator().manual_seed(1))
    found = trainer.loss_at(lm.model, batch, t, 128, 0.0, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    torch.rand(4, generator=generator)
    draws, total = torch.rand(4, width, generator=generator), torch.zeros(())
    for i, row in enumerate(ids):
        pad = begin - len(rows[i]["prompt"])
        for block in range(-(-(width - pad) // B)):
            first, last = pad + block * B, min(pad + block * B + B, width)
            masked = [j for j in range(max(first, begin), last) if draws[i, j] < t[i, block]]
            noisy = row.clone()
            noisy[masked] = lm.mask_id
            logits = lm.model(noisy[None, pad:last]).logits[0][[j - pad for j in masked]]
            total = total + F.cross_entropy(logits, row[masked], reduction="sum") / t[i, block]
    assert float(found.detach()) == pytest.approx(float(total.detach()) / (4 * 128), rel=1e-5)


def test_templates(block_lm: MaskedLM) -> None:
    """Fixed tokens stay, blocks are counted over them, cached or not; gaps may lie blocks apart."""
    text = "a <|mask:5|> b and then something long <|mask:13|> c"
    found = [
        block_lm.generate(text, f"threshold:block_length=2,threshold=0.3,cache={c}").trajectories[0]
        for c in ("exact", "none")
    ]
    assert torch.equal(found[0].tokens, found[1].tokens) and torch.equal(found[0].step, found[1].step)
    assert int((found[0].step >= 0).sum()) == 18 and "b and then something long" in block_lm.tokenizer.decode(
        found[0].tokens[0]
    )
    assert torch.allclose(replay(block_lm, found[0]), found[0].logprob, atol=2e-5)


def test_refusals(block_lm: MaskedLM) -> None:
    lm, ids = block_lm, block_lm.encode(PROMPTS[:1])
    for spec, says in (
        ("ass:blocks=2", "peels commits off across the model's blocks of 8 tokens"),
        ("full:steps=2", "2 steps do not divide over 4 blocks of 8 tokens: choose one of 4, 8"),
        ("semi-ar:block_length=1,cache=prefix,steps=32", "saves nothing"),
        ("semi-ar:block_length=16,cache=dual", "cache=dual approximates what cache=exact keeps exactly"),
    ):
        with pytest.raises(UserError, match=says):
            decode(lm, *ids, make_decoder(spec, max_new_tokens=L))
    with pytest.raises(
        UserError, match="blocks of 12 tokens, which cross the model's blocks of 8 tokens: choose one of 1, 2, 4, 8"
    ):
        decode(lm, *ids, make_decoder("semi-ar:block_length=12", max_new_tokens=24))
    with pytest.raises(UserError, match="cache=exact needs a block-causal model"):
        decode(toy(), *ids, make_decoder("full:cache=exact", max_new_tokens=L))
    assert decoded(lm, "full").tokens.shape[1] == L
    assert decode(lm, *ids, Decoder(max_new_tokens=30)).tokens.shape[1] == L  # whole blocks
