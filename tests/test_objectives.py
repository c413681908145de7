"""Objectives of whole completions: views and losses against plain restatements, two passes = one graph, flat memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import toy
from test_rl import ROWS, disturb, sampled, trainer
from unmask import DiffusionGRPOConfig, DiffusionGRPOTrainer, UserError, make_task
from unmask.rl.objectives import (
    Objective,
    Scores,
    ViewRows,
    cj,
    find_objective,
    step_advantages,
    sum_of_views,
    token_weights,
)
from unmask.rl.rewards import MASK, progress
from unmask.rl.rollout import score_rows

JOINT = [
    "espo",
    "espo:draws=1",
    "gdpo",
    "gdpo:points=2",
    "coupled",
    "spg:block_length=4",
    "spg:block_length=8,draws=3,omega=0.3,beta=1",
]


def scores(views: int, rows: int = 5, length: int = 6) -> Scores:
    """Random ones; some tokens that no view scores, and none in the last row's first view."""
    generator = torch.Generator().manual_seed(views)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    scored = draw(views, rows, length) < 0.6
    scored[:, 0, 2] = scored[0, -1] = False
    new, old, reference = (-3 * draw(views, rows, length) * scored for _ in range(3))
    weight, share = draw(rows, length), draw(views, rows)
    lengths = torch.tensor([6, 5, 6, 3, 2])[:rows]
    return Scores(new.requires_grad_(), old, reference, scored, share, draw(rows) - 0.5, lengths, weight, 0.05, 0.3)


def espo_by_hand(s: Scores) -> Tensor:
    views, rows, length = s.new.shape
    total = torch.zeros((), dtype=torch.float64)
    for b in range(rows):
        new, old, ref = (
            sum(s.share[v, b] * x[v, b, i] for v in range(views) for i in range(length))
            for x in (s.new, s.old, s.reference)
        )
        ratio, advantage = ((new - old) / length).exp(), s.advantages[b]
        clipped = min(max(ratio, 1 - s.epsilon), 1 + s.epsilon)
        row = -min(ratio * advantage, clipped * advantage) + s.beta * (new - ref) ** 2 / 2 / length
        total = total + row * s.weight[b].sum()
    return total


def spg_by_hand(s: Scores, beta: float, omega: float) -> Tensor:
    views, rows, length = s.new.shape
    total = torch.zeros((), dtype=torch.float64)
    for b in range(rows):
        seen = [[i for i in range(length) if s.scored[v, b, i]] for v in range(views)]
        means = [
            sum(s.new[v, b, i] for i in seen[v]) / len(seen[v]) if seen[v] else 0 * s.new[v, b, 0] for v in range(views)
        ]
        bound = elbo = sum(means) / views
        if s.advantages[b] <= 0:
            parts = []
            for i in range(length):
                if hits := [v for v in range(views) if i in seen[v]]:
                    rates = {v: len(seen[v]) / int(s.lengths[b]) for v in hits}
                    parts.append((sum((beta * s.new[v, b, i]).exp() / rates[v] for v in hits) / views).log())
            bound = omega * sum(parts) / max(1, len(parts)) / beta + (1 - omega) * elbo
        total = total - s.advantages[b] * bound * s.weight[b].sum()
    return total


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("name", ["espo", "gdpo", "spg:beta=1.5,omega=0.5", "spg:beta=2,omega=0.2"])
def test_losses_by_hand(name: str, views: int) -> None:
    s, objective = scores(views), find_objective(name)
    assert objective.loss is not None
    expected = espo_by_hand(s)
    if name.startswith("spg"):
        expected = spg_by_hand(s, *((1.5, 0.5) if "1.5" in name else (2.0, 0.2)))
    found = objective.loss(s)[0].sum()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    ours, theirs = (torch.autograd.grad(x, s.new)[0] for x in (found, expected))
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14) and bool(ours.isfinite().all())


def test_preferences_by_hand() -> None:
    s, objective = scores(3, rows=4), find_objective("vrpo:sft_weight=0.1")
    assert s.reference is not None and objective.loss is not None
    expected = torch.zeros((), dtype=torch.float64)
    for pair in (0, 2):
        new, ref = (
            [sum(s.share[v, b] * x[v, b, i] for v in range(3) for i in range(6)) for b in (pair, pair + 1)]
            for x in (s.new, s.reference)
        )
        margin = s.beta * ((new[0] - ref[0]) - (new[1] - ref[1]))
        expected = expected - (1 / (1 + (-margin).exp())).log() - 0.1 * new[0] / int(s.lengths[pair])
    found = objective.loss(s)[0].sum() / 2
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    ours, theirs = (torch.autograd.grad(x, s.new)[0] for x in (found, expected))
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)


PAIRS = [{"prompt": f"make {n}", "chosen": f"{n} is it", "rejected": f"no {n}"} for n in range(8)]
OFFLINE = {
    "objective": "vrpo:draws=2",
    "num_generations": 2,
    "beta": 0.2,
    "bf16": False,
    "report_to": [],
    "model": "tiny",
}
OFFLINE |= {"per_device_train_batch_size": 8, "max_completion_length": 32, "max_steps": 12, "learning_rate": 3e-4}


def test_preferences_are_learned(tmp_path: Path) -> None:
    """From a file, without sampling: masks, one update as one graph over all views, then what a training learns."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    settings: dict[str, Any] = {**OFFLINE, "pairs": str(file)}
    offline = DiffusionGRPOTrainer(toy(), None, DiffusionGRPOConfig(output_dir=str(tmp_path / "run"), **settings))
    assert not offline.eval_dataset
    trajectory = offline.sample(list(offline.train_dataset)[:2]).trajectory  # type: ignore[call-overload]
    assert offline.lm.text(trajectory.tokens) == ["0 is it", "no 0", "1 is it", "no 1"]
    views = offline.views(offline.sample(list(offline.train_dataset)), 0)  # type: ignore[call-overload]
    lengths = offline.lm.lengths(offline.sample(list(offline.train_dataset)).trajectory.tokens) + 1  # type: ignore[call-overload]
    for view in views:
        hidden = view.ids[:, -32:] == offline.lm.mask_id
        assert (
            hidden.sum(1) - view.scored.sum(1) == 32 - lengths
        ).all()  # what fills the canvas shows nobody the length
        assert torch.allclose(view.share, lengths / view.scored.sum(1) / 2)
    offline.rollout = offline.sample(list(offline.train_dataset))  # type: ignore[call-overload]
    expected, gradients = direct_gradient(offline, 0)
    offline.lm.model.zero_grad()
    assert float(offline.update(offline.model, offline.rollout, 0)) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, p in offline.lm.model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], rtol=1e-3, atol=1e-5 * float(gradients[name].abs().max()))
    offline.lm.model.zero_grad()
    offline.train()
    log = [entry for entry in offline.state.log_history if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.6) and log[-1]["preferred"] == 1.0
    assert log[-1]["loss"] < log[0]["loss"] and "reward" not in log[0] and "logprob_mismatch" not in log[0]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            {},
            "rows.jsonl:1, rejected: the row has the columns chosen, prompt: rename them to prompt",
        ),
        (
            {"prompt": "a", "chosen": "b" * 60, "rejected": "c"},
            {},
            "rows.jsonl:1, chosen: 61 tokens exceed max_completion_length 32",
        ),
        ({"prompt": "a", "chosen": 5, "rejected": "c"}, {}, "rows.jsonl:1, chosen: the row.chosen is 5, not text"),
        ("", {}, "rows.jsonl"),
        (PAIRS[0], {"objective": "cj"}, "objective cj samples its completions: leave pairs out"),
        (PAIRS[0], {"pairs": None}, "objective vrpo:draws=2 needs pairs: name their file"),
        (PAIRS[0], {"num_generations": 4}, "num_generations is 4: with pairs choose 2"),
        (PAIRS[0], {"beta": 0.0}, "beta is 0.0: with pairs choose above 0"),
        (PAIRS[0], {"objective": "spg", "pairs": None}, "beta is 0.2, but objective spg compares no policies"),
    ],
)
def test_faulty_pairs(row: Any, settings: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(row and json.dumps(row) + "\n")
    values: dict[str, Any] = {**OFFLINE, "pairs": str(file), **settings}
    with pytest.raises(UserError, match=message):
        DiffusionGRPOTrainer(toy(), None, DiffusionGRPOConfig(output_dir=str(tmp_path / "run"), **values))


def test_masks(tmp_path: Path) -> None:
    """espo: complements, weighed by (L + 1) / k. gdpo: fixed rates, quadrature weights. spg: one block, all behind it."""
    t = sampled(tmp_path, objective="espo:draws=50")
    tokens = t.rollout.trajectory.tokens
    views, every = t.views(t.rollout, 0), []
    for one, other in zip(views[::2], views[1::2], strict=True):
        assert (one.scored ^ other.scored).all()
        for view in (one, other):
            k = view.scored.sum(1)
            assert torch.allclose(view.share, 17 / (100 * k.clamp(min=1).float()))
        every.append(one.scored.sum(1))
    counts = torch.bincount(torch.stack(every).flatten(), minlength=17)
    assert len(counts) == 17 and ((counts - 800 / 17).abs() < 30).all()  # uniform on 0 to 16
    weighed = sum(v.share[:, None] * v.scored for v in views)  # each token's weight is 1 in the mean
    assert float(weighed.mean()) == pytest.approx(1, abs=0.05)
    t.objective = find_objective("gdpo")
    nodes, weights = np.polynomial.legendre.leggauss(3)
    for view, x, w in zip(t.views(t.rollout, 0), (nodes + 1) / 2, weights / 2, strict=True):
        assert (view.scored.sum(1) == round(x * 16)).all()
        assert torch.allclose(view.share, torch.tensor(w * 16 / round(x * 16)).float())
    t.objective = find_objective("spg:block_length=4,draws=4,prompt_masking=0")
    lengths = t.lm.lengths(tokens).clamp(max=15) + 1
    begins = []
    for view in t.views(t.rollout, 0):
        assert torch.equal(view.ids[:, :-16], t.rollout.trajectory.prompt)
        hidden = view.ids[:, -16:] == t.lm.mask_id
        for row, n in zip(range(16), lengths.tolist(), strict=True):
            first = int(hidden[row].int().argmax())
            block = first // 4 * 4
            assert hidden[row, min(block + 4, n) :].all() and not hidden[row, :block].any() and first < n
            assert view.scored[row].tolist() == [bool(h) and i < n for i, h in enumerate(hidden[row].tolist())]
            begins.append((row, block))
    assert len(set(begins)) == sum(-(-n // 4) for n in lengths.tolist())  # no block twice while others are left
    t.objective = find_objective("spg:prompt_masking=0.5")
    prompt = torch.cat([v.ids[:, :-16] for v in t.views(t.rollout, 0)]) == t.lm.mask_id
    real = t.rollout.trajectory.prompt_mask.repeat(2, 1)
    assert not (prompt & ~real).any() and float(prompt[real].float().mean()) == pytest.approx(0.5, abs=0.1)


def direct_gradient(t: Any, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients with all views in one graph."""
    views, rollout, active = t.views(t.rollout, iteration), t.rollout, t.rollout.active
    table = ViewRows.of(views)
    logprob, _, _, row, column = score_rows(t.lm, rollout.trajectory, table)
    view = table.view[table.scored.nonzero()[:, 0]]
    new = torch.zeros(len(views), *rollout.trajectory.tokens.shape, dtype=logprob.dtype).index_put(
        (view, row, column), logprob
    )
    stored = iteration if t.objective.fresh else 0
    counted = t._counted(rollout.trajectory)
    weight = token_weights([counted], t.config.loss_type)[0]
    share = torch.stack([v.share for v in views])[:, active]
    s = Scores(
        new[:, active],
        new.detach()[:, active] if rollout.old is None else rollout.old[stored][:, active],
        None if rollout.reference is None else rollout.reference[stored][:, active],
        torch.stack([v.scored for v in views])[:, active],
        share,
        rollout.advantages[active],
        counted.sum(1)[active],
        weight[active],
        t.config.epsilon,
        t.config.beta,
    )
    loss = t.objective.loss(s)[0].sum() / len(active)
    names, parameters = zip(*t.lm.model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(("name", "block"), [*((name, None) for name in JOINT), ("espo", 8), ("spg:block_length=4", 8)])
def test_two_passes_are_one_graph(name: str, block: int | None, tmp_path: Path) -> None:
    """Float64 (but for the norms, which are float32), off policy, three rows a pass against all views in one graph."""
    lm = toy() if block is None else toy(block_length=block)
    lm.model.double()
    beta = 0.0 if name.startswith("spg") else 0.2
    t = sampled(
        tmp_path,
        lm,
        objective=name,
        loss_type="grpo",
        num_iterations=2,
        beta=beta,
        rows_per_forward=3,
        mask_after_eos=True,
    )
    for iteration in (0, 1):
        if iteration:
            disturb(t.lm.model, 0.002)
        expected, gradients = direct_gradient(t, iteration)
        t.lm.model.zero_grad()
        found = t.update(t.model, t.rollout, iteration)
        assert float(found) == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-10)
        for parameter, p in t.lm.model.named_parameters():
            limit = 1e-6 if "norm" in parameter or "ln_f" in parameter else 1e-10
            assert float((p.grad - gradients[parameter]).abs().max()) < limit


def likelihood(scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """A loss that is no function of ratios."""
    loss = -scores.advantages * (scores.share[..., None] * scores.new).square().sum((0, 2))
    return loss, torch.zeros_like(loss)[:, None], torch.zeros_like(loss)[:, None]


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_loss_of_ones_own_sees_the_log_probabilities(iterations: int, tmp_path: Path) -> None:
    """Whatever it looks at: with one inner iteration and no penalty too, where the shipped losses need no first pass."""
    t = trainer(tmp_path, objective="espo", num_iterations=iterations, rows_per_forward=3)
    t.objective = Objective(find_objective("espo").views, fresh=True, loss=likelihood)
    t.rollout = t.sample(ROWS)
    for iteration in range(iterations):
        expected, gradients = direct_gradient(t, iteration)
        t.lm.model.zero_grad()
        assert float(t.update(t.model, t.rollout, iteration)) == pytest.approx(float(expected.detach()), rel=1e-5)
        for name, p in t.lm.model.named_parameters():
            assert torch.allclose(p.grad, gradients[name], rtol=1e-3, atol=1e-5 * float(gradients[name].abs().max()))


@pytest.mark.parametrize("objective", ["cj", "espo"])
def test_dropout_is_refused(objective: str, tmp_path: Path) -> None:
    """Wherever it comes from: an update would see another policy than the one that sampled."""
    lm = toy()
    lm.model.add_module("own", torch.nn.Dropout(0.1))
    with pytest.raises(UserError, match=r"own drops out with probability 0\.1: set it to 0"):
        trainer(tmp_path, lm, objective=objective)


def test_single_tokens_through_the_loss_of_all_views(tmp_path: Path) -> None:
    """``cj`` with its surrogate as a loss of all views: the same loss and gradient, on and off policy."""
    together = Objective(cj.views, recorded=True, loss=sum_of_views)
    for iteration in (0, 1):
        found = []
        for objective in (cj, together):
            t = trainer(
                tmp_path, decoder="eoser-ass", loss_type="grpo", num_iterations=2, beta=0.1, max_logprob_mismatch=9
            )
            t.objective = objective
            t.rollout = t.sample(ROWS)
            if iteration:
                disturb(t.lm.model, 0.003)
            loss = t.update(t.model, t.rollout, iteration)
            found.append((float(loss), torch.cat([p.grad.flatten() for p in t.lm.model.parameters()])))
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
        assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
    t.objective = Objective(find_objective("espo").views)
    with pytest.raises(UserError, match="scores a token in several views: make it an Objective with a loss of them"):
        t.views(t.rollout, 0)


class Kept:
    """Bytes that autograd keeps for backward passes, now and at most."""

    now = peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor, tensor.untyped_storage().nbytes()
        Kept.now += self.size
        Kept.peak = max(Kept.peak, Kept.now)

    def __del__(self) -> None:
        Kept.now -= self.size


@pytest.mark.parametrize(
    ("name", "counts"), [("espo:draws", (1, 4, 16)), ("gdpo:points", (2, 8, 32)), ("spg:draws", (2, 8, 32))]
)
def test_memory_does_not_grow_with_views(name: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    """One graph is alive at a time: 2, 8 and 32 views keep as much."""
    peaks = []
    for count in counts:
        t = sampled(tmp_path, objective=f"{name}={count}", rows_per_forward=16)
        Kept.now = Kept.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            t.update(t.model, t.rollout, 0)
        peaks.append(Kept.peak)
    assert max(peaks) < 1.05 * min(peaks)


def test_progress_pays_what_a_step_adds() -> None:
    """A Sudoku with four gaps: none, three and all of them right, then a wrong one put in again."""
    task = make_task("sudoku:style=compact,min_empty=4,max_empty=4", {})
    problem = task.problems("test", 1)[0]
    puzzle, solution = problem.truth["puzzle"], problem.truth["solution"]

    def draft(right: int) -> str:
        gaps = [i for i, cell in enumerate(puzzle) if cell == "0"]
        cells = "".join(MASK if i in gaps[right:] else cell for i, cell in enumerate(solution))
        rows = " ".join(f"{name}{cells[4 * i : 4 * i + 4]}" for i, name in enumerate("abcd"))
        return f"<reasoning>{MASK}</reasoning><answer>{rows}</answer>"

    drafts = [[draft(right) for right in (0, 3, 4, 1)]]
    assert progress([""], [drafts[0][-1]], [problem], [task], drafts) == [[0.0, 0.75, 0.25, -0.75]]


def test_steps_that_are_paid_for(tmp_path: Path) -> None:
    """GRPO's process supervision by hand; an objective with one advantage a completion refuses; drafts are the states."""
    nan = float("nan")
    paid = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, nan], [3.0, 3.0, nan], [3.0, 3.0, 3.0]])
    found = step_advantages(paid, 2, "group")
    values = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    a, b, c, d, e = ((values - values.mean()) / (values.std() + 1e-4)).tolist()
    assert torch.allclose(found, torch.tensor([[a + b + c, b + c, c], [d + e, e, 0], [0, 0, 0], [0, 0, 0]]), atol=1e-5)
    drafted: list[list[str]] = []

    def vowels(prompts: Any, completions: Any, drafts: Any, **_: Any) -> Any:
        drafted.extend(drafts)
        return [[sum(c in "aeiou" for c in text) / 10 for text in texts] for texts in drafts]

    t = sampled(tmp_path, rewards=vowels, rows_per_forward=5)
    trajectory, step = t.rollout.trajectory, t.rollout.trajectory.step.long()
    for row, texts in enumerate(drafted):
        assert len(texts) == int(step[row].max()) + 1
        assert texts[-1] == t.lm.text(trajectory.tokens)[row]
        assert "\N{WHITE SQUARE}" in texts[0]
    table = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor([sum(c in "aeiou" for c in x) / 10 for x in texts]) for texts in drafted], True, nan
    )
    expected = step_advantages(table, 4, "group").gather(1, step)
    assert torch.allclose(t.rollout.advantages, expected, atol=1e-6) and len(t.rollout.advantages.unique()) > 16
    loss = t.update(t.model, t.rollout, 0)  # the ratio is one: minus the weighted advantages
    each = [-expected[b][step[b] == s].mean() for b in range(16) for s in range(int(step[b].max()) + 1)]
    assert float(loss) == pytest.approx(float(torch.stack(each).view(16, -1).mean()), abs=1e-5)
    with pytest.raises(UserError, match="objective espo has one advantage a completion"):
        sampled(tmp_path, rewards=vowels, objective="espo")

    def short(prompts: Any, completions: Any, drafts: Any, **_: Any) -> Any:
        return [[0.0] for _ in completions]

    with pytest.raises(UserError, match=r"reward function short returned \[0.0\] for .*: return 4 values, one a step"):
        sampled(tmp_path, rewards=short)

    def blind(prompts: Any, completions: Any, **_: Any) -> Any:
        return [[0.0, 1.0] for _ in completions]

    with pytest.raises(UserError, match="name drafts among its arguments to pay for steps"):
        sampled(tmp_path, rewards=blind)

    def last(prompts: Any, completions: Any, drafts: Any, **_: Any) -> Any:
        return [[0.0] * (len(texts) - 1) + [1.0] for texts in drafts]

    def same(prompts: Any, completions: Any, drafts: Any, **_: Any) -> Any:
        return [[-0.1] * len(texts) for texts in drafts]

    assert sampled(tmp_path, rewards=last).rollout.active.all()  # alike in every row, but not in every step
    assert not sampled(tmp_path, rewards=same, decoder="threshold:block_length=8,threshold=0.5").rollout.active.any()
