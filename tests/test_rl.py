"""Reinforcement learning: objectives against plain restatements, ratio one where sampled, faulty rewards, one process = two."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from conftest import PROMPTS, toy
from unmask import DiffusionGRPOConfig, DiffusionGRPOTrainer, UserError, make_task
from unmask.rl.objectives import OBJECTIVES, View, sample_views, token_weights

ROWS = [{"prompt": p} for p in PROMPTS]
EVERYONE = torch.ones(16, dtype=torch.bool)


def digits(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    """Varies between random completions."""
    return [sum(c in "aeiou0123456789" for c in text) / 10 for text in completions]


def trainer(folder: Path, lm: Any = None, rewards: Any = digits, rows: Any = ROWS, **settings: Any) -> Any:
    values = {"max_completion_length": 16, "num_generations": 4, "per_device_train_batch_size": 16, "max_steps": 4}
    values |= {"report_to": [], "bf16": False, "max_grad_norm": 1.0}
    adapter = settings.pop("peft_config", None)
    args = DiffusionGRPOConfig(output_dir=str(folder), **{**values, **settings})
    return DiffusionGRPOTrainer(lm or toy(), rewards, args, rows, peft_config=adapter)


def sampled(folder: Path, lm: Any = None, **settings: Any) -> Any:
    """A trainer that has sampled its first rollout."""
    t = trainer(folder, lm, **settings)
    t.rollout = t.sample(ROWS)
    return t


def disturb(model: torch.nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))


VIEWS = [*((o, "threshold") for o in ("cj", "one-step", "diffu", "coupled", "tracerl")), ("cj", "eoser-ass")]
VIEWS += [
    ("coupled", "semi-ar:block_length=8"),
    ("tracerl:merge=3", "eoser-ass"),
    ("justgrpo", "semi-ar:block_length=1"),
]


@pytest.mark.parametrize(("objective", "decoder"), VIEWS)
def test_views_score_every_token(tmp_path: Path, objective: str, decoder: str) -> None:
    t = sampled(tmp_path, objective=objective, decoder=decoder, max_completion_length=32, num_iterations=2)
    trajectory = t.rollout.trajectory
    for iteration in range(2):
        views = t.views(t.rollout, iteration)
        pair = views[1:] if objective == "coupled" else views  # the full mask, then two that hide each token once
        assert (torch.stack([v.scored for v in pair]).sum(0) == 1).all() and views[0].scored.any()
        if objective == "coupled":
            assert views[0].scored.all() and views[0].share.tolist() == [0.5] * 16
            assert torch.allclose(0.5 / views[1].share + 0.5 / views[2].share, torch.ones(16))  # t and 1 - t
            assert ((views[1].scored.float().mean(1) - 0.5 / views[1].share).abs() < 0.25).all()
        for view in views:
            canvas = view.ids[:, trajectory.prompt.shape[1] :]
            assert (canvas[view.scored] == trajectory.mask_id).all()  # what is scored is hidden
            seen = canvas != trajectory.mask_id
            assert torch.equal(canvas[seen], trajectory.tokens[seen])
            prompt = view.ids[:, : trajectory.prompt.shape[1]]
            changed = prompt != trajectory.prompt
            assert (prompt[changed] == trajectory.mask_id).all() and not (changed & ~trajectory.prompt_mask).any()
            assert bool(changed.any()) == (objective == "diffu")
    if t.objective.fresh:
        first, second = (t.views(t.rollout, i)[-1].ids for i in range(2))
        assert not torch.equal(first, second)


def restated_loss(t: DiffusionGRPOTrainer, old_model: Any, reference: Any, iteration: int) -> torch.Tensor:
    """The clipped objective in loops and float64: rows, views, tokens; every forward on one row without padding."""
    args, lm, trajectory = t.config, t.lm, t.rollout.trajectory
    total = torch.zeros((), dtype=torch.float64)
    rewards = torch.tensor(digits([], lm.text(trajectory.tokens)), dtype=torch.float64)  # type: ignore[arg-type]

    def logprobs(model: Any, prompt: list[int], canvas: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + canvas])).logits[0].double()
        logits[:, lm.mask_id] = -torch.inf
        return logits.log_softmax(-1)[len(prompt) :]

    views = t.views(t.rollout, iteration)
    for b in range(len(rewards)):
        group = rewards[b // args.num_generations * args.num_generations :][: args.num_generations]
        advantage = rewards[b] - group.mean()
        if args.scale_rewards == "group":
            advantage = advantage / (group.std() + 1e-4)
        if (group == group[0]).all():
            continue
        padding = int((~trajectory.prompt_mask[b]).sum())
        tokens, step = trajectory.tokens[b].tolist(), trajectory.step[b].tolist()
        end = next((i for i, token in enumerate(tokens) if token in lm.end_ids), len(tokens))
        per_view: list[list[torch.Tensor]] = []
        joint: dict[int, torch.Tensor] = {}
        objective, _, parameter = args.objective.partition(":")
        if objective in ("cj", "tracerl", "agrpo"):
            merge = int(parameter.removeprefix("merge=")) if objective == "tracerl" else 1
            first = range(0, max(step) + 1, merge)
            canvases = [[x if step[i] < s else lm.mask_id for i, x in enumerate(tokens)] for s in first]
            states = [
                (c, [i for i in range(len(tokens)) if s <= step[i] < s + merge])
                for s, c in zip(first, canvases, strict=True)
            ]
            if objective == "agrpo":  # which steps are drawn is tested below
                drawn = sample_views(views, int(parameter.removeprefix("steps=")), t.rollout.seeds, iteration)
                states = [(c, at if drawn[s].scored[b].any() else []) for s, (c, at) in enumerate(states)]
            prompts = [trajectory.prompt[b, padding:].tolist()] * len(states)
        else:  # the other views are checked by test_views_score_every_token
            width = trajectory.prompt.shape[1]
            canvases = [v.ids[b, width:].tolist() for v in views]
            states = [(c, [i for i in range(len(tokens)) if c[i] == lm.mask_id]) for c in canvases]
            prompts = [v.ids[b, padding:width].tolist() for v in views]
        for v, (prompt, (canvas, scored)) in enumerate(zip(prompts, states, strict=True)):
            if args.mask_after_eos:
                scored = [i for i in scored if i <= end]
            policies = [logprobs(model, prompt, canvas) for model in (lm.model, old_model, reference)]
            triples = {i: torch.stack([p[i, tokens[i]] for p in policies]) for i in scored}
            if args.objective == "coupled":  # (log p under the full mask + that under the token's mask / t) / 2
                t_masked = float(0.5 / views[v].share[b]) if v else 1.0
                joint.update({i: joint.get(i, 0) + x / t_masked / 2 for i, x in triples.items()})
            elif triples:
                per_view.append([token_loss(x, advantage, args) for x in triples.values()])
        if args.objective == "coupled":
            per_view = [[token_loss(x, advantage, args) for x in joint.values()]]
        every = [x for losses in per_view for x in losses]
        if args.loss_type == "step":
            total = total + torch.stack([torch.stack(losses).mean() for losses in per_view]).mean() / len(rewards)
        elif args.loss_type == "grpo":
            total = total + torch.stack(every).mean() / len(rewards)
        elif args.loss_type == "dr_grpo":
            total = total + torch.stack(every).sum() / trajectory.tokens.shape[1] / len(rewards)
        else:
            ends = lm.lengths(trajectory.tokens).clamp(max=trajectory.tokens.shape[1] - 1) + 1
            count = int(ends.sum() if args.mask_after_eos else trajectory.tokens.numel())
            total = total + torch.stack(every).sum() / count
    return total


def token_loss(logprobs: torch.Tensor, advantage: torch.Tensor, args: Any) -> torch.Tensor:
    """Clipped surrogate and k3 of one token's log-probability under the new, the old and the reference policy."""
    new, old, ref = logprobs
    ratio = (new - old.detach()).exp()
    clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
    d = ref.detach() - new
    return -torch.minimum(ratio * advantage, clipped * advantage) + args.beta * (d.exp() - d - 1)


SETTINGS = ("objective", "loss_type", "scale_rewards", "mask_after_eos", "beta")


@pytest.mark.parametrize(
    "values",
    [
        ("cj", "step", "group", False, 0.0),
        ("cj", "step", "none", True, 0.3),
        ("cj", "bnpo", "none", True, 0.3),
        ("one-step", "grpo", "none", True, 0.3),
        ("diffu", "bnpo", "group", False, 0.3),
        ("tracerl:merge=2", "step", "none", False, 0.3),
        ("tracerl:merge=3", "dr_grpo", "group", True, 0.0),
        ("agrpo:steps=2", "step", "none", True, 0.3),
        ("coupled", "step", "group", True, 0.0),
        ("coupled", "grpo", "none", False, 0.3),
    ],
)
def test_loss_and_gradient_equal_a_plain_restatement(tmp_path: Path, values: tuple[Any, ...]) -> None:
    """Off policy (the weights have moved since the rollout), so that ratio, clipping and KL all count."""
    settings: dict[str, Any] = dict(zip(SETTINGS, values, strict=True))
    t = trainer(tmp_path, decoder="eoser-ass", num_iterations=2, epsilon=0.1, rows_per_forward=3, **settings)
    reference, old = toy().model, toy().model
    disturb(old, 0.003)
    t.lm.model.load_state_dict(old.state_dict())
    t.rollout = t.sample(ROWS)
    disturb(t.lm.model, 0.003)
    check_update(t, old, reference, 1)
    assert 0 < t.pending_metrics["clip_fraction"] < 1


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_first_update_of_coupled_equals_a_plain_restatement(tmp_path: Path, beta: float) -> None:
    """On policy the ratios are one, so that without a KL penalty the update needs no second pass over the views."""
    lm, reference = toy(), toy().model
    disturb(lm.model, 0.01)
    t = trainer(tmp_path, lm, objective="coupled", loss_type="bnpo", beta=beta, rows_per_forward=5)
    if beta:
        t.reference_model.load_state_dict(reference.state_dict())
    t.rollout = t.sample(ROWS)
    check_update(t, copy.deepcopy(lm.model), reference, 0)


def check_update(t: DiffusionGRPOTrainer, old: Any, reference: Any, iteration: int) -> None:
    found = t.update(t.model, t.rollout, iteration)
    gradients = [p.grad.clone() for p in t.lm.model.parameters()]
    t.lm.model.zero_grad()
    expected = restated_loss(t, old, reference, iteration)
    expected.backward()
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    for mine, p in zip(gradients, t.lm.model.parameters(), strict=True):
        assert torch.allclose(mine, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-7)


@pytest.mark.parametrize("decoder", ["eoser-ass:cfg_scale=0.5", "threshold", "semi-ar:block_length=8", "dream:top_p=1"])
def test_ratio_is_one_on_the_sampled_states_for_the_policy_that_sampled(tmp_path: Path, decoder: str) -> None:
    """cj, mixed-length prompts, float32: recorded and recomputed log-probabilities agree under every kind of decoder."""
    twice = {"old_logprobs": "recomputed", "num_iterations": 2}
    t = sampled(tmp_path, decoder=decoder, max_completion_length=32, rows_per_forward=6, **twice)
    t.update(t.model, t.rollout, 0)
    assert abs(t.pending_metrics["ratio"] - 1) < 1e-4 and t.pending_metrics["logprob_mismatch"] < 1e-4
    t.rollout.active = EVERYONE
    with t.inference() as policy:
        again = t.score_views(policy, t.rollout)
    assert float(((again[0] - t.rollout.trajectory.logprob).exp() - 1).abs().max()) < 1e-4
    disturb(t.lm.model, 0.05)
    with pytest.raises(UserError, match="does not see the policy that sampled"):
        t.update(t.model, t.rollout, 0)


def test_other_objectives_score_another_policy(tmp_path: Path) -> None:
    """What one-step and diffu optimise is not what was sampled; on the first state alone they agree."""
    gaps = {}
    for objective in ("cj", "one-step", "diffu", "coupled"):
        t = sampled(tmp_path, objective=objective)
        t.update(t.model, t.rollout, 0)
        gaps[objective] = t.pending_metrics["logprob_mismatch"]
        assert abs(t.pending_metrics["ratio"] - 1) < 1e-6  # old and new policy are the same
        if objective == "one-step":
            with t.inference() as policy:
                t.rollout.active = EVERYONE
                found = t.score_views(policy, t.rollout)[0]
            first = t.rollout.trajectory.committed(0)
            assert torch.allclose(found[first], t.rollout.trajectory.logprob[first], atol=1e-4)
    assert gaps["cj"] < 1e-4 < 0.1 < min(gaps["one-step"], gaps["diffu"], gaps["coupled"])


def test_sampled_steps_favor_no_row_and_no_step() -> None:
    """A row cut after two tokens has the weight of a whole one, and of a row's steps each is as likely as another."""
    rows, steps = 400, 16
    step = torch.arange(steps).expand(rows, steps)
    kept = torch.where(torch.arange(rows) % 2 == 0, 2, steps)
    ids = torch.zeros(rows, steps, dtype=torch.int64)
    views = [View(ids, (step == s) & (step < kept[:, None])) for s in range(steps)]
    chosen = sample_views(views, 4, torch.arange(rows) * 2, 0)
    for loss_type in ("step", "grpo"):
        weights = torch.stack(token_weights([v.scored for v in chosen], loss_type)).sum((0, 2))  # type: ignore[arg-type]
        assert torch.allclose(weights, torch.ones(rows))
    scored = torch.stack([v.scored.any(1) for v in chosen])  # (views, B)
    assert (scored.sum(0) == kept.clamp(max=4)).all() and len({tuple(x) for x in scored.T.tolist()}) > 100
    counts = scored[:, 1::2].sum(1).float()  # 200 whole rows choose 4 of 16 steps: 50 a step
    assert counts.sum() == 800 and ((counts - 50).abs() < 25).all()


def test_rows_at_their_groups_mean_stay_in_the_loss(tmp_path: Path) -> None:
    """Their advantage is 0, but their KL counts."""
    values = itertools.cycle([0.0, 0.5, 1.0, 0.5])

    def cycled(prompts: Any, completions: Any, **_: Any) -> Any:
        return [next(values) for _ in completions]

    t = sampled(tmp_path, rewards=cycled, beta=0.1)
    assert t.rollout.active.all() and (t.rollout.advantages == 0).sum() == 8
    disturb(t.lm.model, 0.01)
    t.rollout.advantages = torch.zeros(16)
    t.config.max_logprob_mismatch = 10.0
    assert float(t.update(t.model, t.rollout, 0)) > 0


def test_groups_without_variance_are_replaced_by_those_of_other_prompts(tmp_path: Path) -> None:
    """Only prompts of odd length have rewards that differ; the groups of others make room, in place, and nothing else."""

    def even(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [v * (len(p) % 2) for v, p in zip(digits([], completions), prompts, strict=True)]  # type: ignore[operator]

    rows = [{"prompt": "x" * n} for n in (1, 2, 3, 4, 6, 8, 10, 12)]
    few = {"rewards": even, "rows": rows, "rows_per_forward": 8}
    plain, dynamic = (trainer(tmp_path / str(n), max_resamples=n, **few) for n in (0, 6))
    batch = [rows[i] for i in (0, 1, 2, 3)]
    before, after = plain.sample(batch), dynamic.sample(batch)
    assert before.active.view(4, 4).all(1).tolist() == [True, False, True, False]
    assert after.active.all() and dynamic.pending_metrics["groups_replaced"] == 0.5
    cost = dynamic.pending_metrics["samples_per_completion"]
    assert 1.5 <= cost <= 4 and cost * 16 % 8 == 0  # whole forward passes
    for name in ("reward", "groups_without_variance"):  # of the prompts as they come
        assert plain.pending_metrics[name] == dynamic.pending_metrics[name]
    for group, kept in enumerate((True, False, True, False)):
        rows_of = slice(4 * group, 4 * group + 4)
        same = torch.equal(before.trajectory.tokens[rows_of], after.trajectory.tokens[rows_of])
        assert same == kept
    again = trainer(tmp_path / "again", max_resamples=6, **few).sample(batch)
    assert torch.equal(again.trajectory.tokens, after.trajectory.tokens)
    none = trainer(tmp_path / "none", max_resamples=2, **{**few, "rows": rows[3:]}).sample([rows[3]] * 4)
    assert not none.active.any()  # there is nothing better


@pytest.mark.parametrize("adapter", [False, True])
def test_activation_checkpointing_recomputes_and_changes_nothing(tmp_path: Path, adapter: bool) -> None:
    gradients, calls = [], [0]
    for on in (False, True):
        lm = toy()
        inside = lm.model.model.transformer["blocks"][0].attn_norm
        inside.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        t = trainer(tmp_path, lm, objective="one-step", lora_r=2 if adapter else None)
        if on:
            t.model.activation_checkpointing_enable({"use_reentrant": False})
        t.rollout = t.sample(ROWS)
        calls[0] = 0
        t.update(t.model, t.rollout, 0)
        assert calls[0] == (2 if on else 1)  # once more in the backward pass
        gradients.append(torch.cat([p.grad.flatten() for p in t.model.parameters() if p.requires_grad]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_lora_reference_is_the_model_without_its_adapter(tmp_path: Path) -> None:
    t = sampled(tmp_path, beta=0.1, lora_r=4)
    trainable = [n for n, p in t.model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 7 and all("lora" in n for n in trainable)  # 2 layers, 7 matrices, A and B
    active, recorded = t.rollout.active, t.rollout.trajectory.logprob
    assert torch.allclose(t.rollout.reference[0][active], recorded[active], atol=1e-4)  # B starts at zero
    disturb(t.model, 0.02)
    again = t.sample(ROWS)
    assert not torch.allclose(again.reference[0], again.trajectory.logprob, atol=1e-2)
    plain = trainer(tmp_path)
    with plain.inference() as policy:
        assert torch.allclose(plain.score_views(policy, again)[0], again.reference[0], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "semi-ar:block_length=8,cache=dual"}, "samples from an approximation"),
        ({"decoder": "threshold:block_length=8", "compile": True}, "compile needs batches of one shape"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"objective": "one_step"}, "unknown objective 'one_step': did you mean 'one-step'"),
        ({"objective": "agrpo:steps=0"}, "steps is 0"),
        ({"objective": "agrpo:step=2"}, "unknown parameter of objective agrpo 'step': did you mean 'steps'"),
        ({"objective": "cj:steps=2"}, "objective cj takes no parameters: leave out steps"),
        ({"objective": "justgrpo"}, "justgrpo needs tokens from left to right: set semi-ar:block_length=1"),
        ({"trainer_args": {"gradient_accumulation_steps": 2}}, "raise per_device_train_batch_size"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"tasks": ["sudoku", "sudoku:max_empty=4"]}, "names a task twice"),
        ({"rows": [{"text": "x"}]}, "prompt None"),
        ({"rows": [{"prompt": "x"}, {"prompt": "y", "more": 1}]}, r"different columns \(\['more'\]\)"),
        ({"rows": [{"prompt": "x" * 2000}]}, "shorten the prompt"),
        ({"rewards": []}, "no reward function"),
        ({"reward_weights": [1.0, 2.0]}, "2 reward_weights for the reward functions digits"),
        (
            {"peft_config": LoraConfig(r=2, lora_dropout=0.05, target_modules=["q_proj"])},
            r"drops out with probability 0\.05: set it to 0",
        ),
    ],
)
def test_wrong_settings_name_the_fix(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **settings)


def test_a_task_is_enough_and_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    """Two updates on the shipped model: a task has prompts and rewards, and is validated."""
    sizes: dict[str, Any] = {"problems": 4, "validation_problems": 2, "num_generations": 2, "max_completion_length": 16}
    sizes |= {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "report_to": []}
    task = make_task("countdown:style=compact,max_value=6", {})
    t = DiffusionGRPOTrainer("tiny", task, DiffusionGRPOConfig(output_dir=tmp_path, **sizes))
    t.train()
    assert t.state.global_step == 2 and "eval_countdown_solved" in t.state.log_history[0]
    assert "reward_countdown" in t.state.log_history[1]
    both = DiffusionGRPOTrainer("tiny", [digits, "solved"], DiffusionGRPOConfig(output_dir=tmp_path, **sizes), task)
    assert list(both.reward_funcs) == ["digits", "solved"] and len(both.train_dataset) == 4  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the train data set is empty: set tasks, or pass a Task"):
        DiffusionGRPOTrainer("tiny", digits, DiffusionGRPOConfig(output_dir=tmp_path, **sizes))
    rows = trainer(tmp_path, rows=[{"prompt": [{"role": "user", "content": "make 5"}]}]).train_dataset
    assert rows[0]["prompt"] == "<|user|>make 5<|assistant|>"


OBJECTIVE = """
from dataclasses import replace

from unmask.rl.objectives import OBJECTIVES, View, one_step


def first_half(trajectory, seeds, iteration):
    for view in one_step.views(trajectory, seeds, iteration):
        yield replace(view, scored=view.scored & (view.scored.cumsum(1) <= view.scored.shape[1] // 2))


OBJECTIVES.register("registered-half")(first_half)
number = 3
"""


def test_an_objective_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_objective.py").write_text(OBJECTIVE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_objective:first_half", "registered-half"):
        t = sampled(tmp_path, objective=name)
        (view,) = t.views(t.rollout, 0)
        assert view.scored[:, :8].all() and not view.scored[:, 8:].any()
        t.update(t.model, t.rollout, 0)
        assert any(p.grad.abs().sum() > 0 for p in t.lm.model.parameters())
    monkeypatch.delitem(OBJECTIVES, "registered-half")
    with pytest.raises(UserError, match="objective 'own_objective:number' is int"):
        trainer(tmp_path, objective="own_objective:number")


def test_a_compiled_model_sees_few_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of twenty lengths have three widths; one graph, and one of any width, for each mode of the model and the mask."""
    compile_whole, rows = torch.nn.Module.compile, [{"prompt": "x" * n} for n in range(5, 180, 9)]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_whole(self, **how, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shapes: set[Any] = set()
    settings: dict[str, Any] = {"compile": True, "rows_per_forward": 4, "max_steps": 6, "save_steps": 99}
    t = trainer(tmp_path, rows=rows, per_device_train_batch_size=8, **settings)
    t.model.register_forward_pre_hook(lambda _, args, kwargs: shapes.add(kwargs["input_ids"].shape), with_kwargs=True)
    t.train()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert shapes == {(4, width + 16) for width in (64, 128, 176)}
    assert graphs <= 7


def test_a_compiled_block_model_samples_with_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache's windows have many shapes, so a rollout makes no graph; an update does."""
    compile_whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_whole(self, **how, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    t = sampled(tmp_path, toy(block_length=8), compile=True)
    graphs = torch._dynamo.utils.counters["stats"]
    assert t.rollout.trajectory.decoder["cache"] == "exact" and graphs["unique_graphs"] == 0
    t.update(t.model, t.rollout, 0)
    assert graphs["unique_graphs"] > 0
    torch._dynamo.reset()


def test_an_update_in_blocks_takes_a_forward_a_step_of_a_block(tmp_path: Path) -> None:
    """One token a step, 16 of them: eight forward passes or fewer, as many as a block has tokens."""
    t = sampled(tmp_path, toy(block_length=8), decoder="full:steps=16", rows_per_forward=16)
    passes: list[int] = []
    t.model.register_forward_pre_hook(lambda *_: passes.append(1))
    t.update(t.model, t.rollout, 0)
    assert t.rollout.trajectory.steps >= 16 and len(passes) <= 8
