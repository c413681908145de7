"""Distillation along trajectories: guided decodes, the loss against a plain restatement, teachers, whole runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Bernoulli, kl_divergence

from benchmarks.report.command import command as report
from conftest import PROMPTS, SEEDS, saved
from test_rl_runs import start
from unmask import DiffusionGRPOConfig, DistillConfig, DistillTrainer, SFTConfig, UserError, decode, load, make_decoder
from unmask.cli import main
from unmask.config import read_config, save_config
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.evaluate import evaluate
from unmask.io.files import read_lines
from unmask.rl.distill import LOSSES, GuidedLoop, Teacher, state_views, student_trajectory, train
from unmask.rl.run import train as train_rl
from unmask.training.sft import train as train_sft

TINY = Path(__file__).parent.parent / "configs" / "tiny"
LENGTH = 32
TASK = "countdown:style=compact,max_value=6"


def teacher_of(lm: Any, spec: str) -> tuple[Any, Teacher]:
    decoder = make_decoder(spec, max_new_tokens=LENGTH)
    found = decode(lm, *lm.encode(PROMPTS, LENGTH), decoder, SEEDS)
    return found, Teacher(found.tokens, found.step.long(), found.logprob)


def guided(lm: Any, spec: str, teacher: Teacher, **how: Any) -> Any:
    loop = GuidedLoop(lm, make_decoder(spec, max_new_tokens=LENGTH), teacher, **how)
    with torch.no_grad():
        return student_trajectory(lm, PROMPTS, loop, SEEDS, rows_per_forward=3), loop


@pytest.mark.parametrize("spec", ["eoser-ass", "threshold:threshold=0.3", "semi-ar:block_length=8", "full:steps=7"])
def test_ones_own_tokens_as_teacher_make_a_plain_decode(toy_lm: Any, spec: str) -> None:
    plain, teacher = teacher_of(toy_lm, spec)
    found, loop = guided(toy_lm, spec, teacher)
    assert torch.equal(found.tokens, plain.tokens) and torch.equal(found.step, plain.step)
    assert torch.allclose(found.logprob, plain.logprob, atol=1e-5) and loop.agreed[0] == loop.agreed[1]


def test_the_students_order_and_the_teachers_tokens(toy_lm: Any) -> None:
    plain, _ = teacher_of(toy_lm, "eoser-ass")
    other, teacher = teacher_of(toy_lm, "full:temperature=2")
    found, loop = guided(toy_lm, "eoser-ass", teacher)
    assert torch.equal(found.tokens, other.tokens) and not torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.committed(0), plain.committed(0)) and loop.agreed[0] < loop.agreed[1]
    kept, _ = guided(toy_lm, "eoser-ass", teacher, own_tokens=1.0)
    assert torch.equal(kept.tokens, plain.tokens) and torch.equal(kept.step, plain.step)
    some, _ = guided(toy_lm, "eoser-ass", teacher, own_tokens=0.5)
    differ = some.tokens != other.tokens
    assert differ.any() and all(not differ[some.committed(s)].all() for s in range(2))


def test_the_teachers_order(toy_lm: Any) -> None:
    _, teacher = teacher_of(toy_lm, "full:temperature=2")
    found, _ = guided(toy_lm, "ass", teacher, teacher_order=True)
    assert found.step.amax(1).tolist() == [4] * 4
    for own, its in zip(found.step.tolist(), teacher.steps.tolist(), strict=True):
        assert [s for _, s in sorted(zip(its, own, strict=True))] == sorted(own)


def test_divergences_are_those_of_two_outcomes() -> None:
    p, q = torch.tensor([0.2, 0.9, 0.999]), torch.tensor([0.5, 0.3, 0.99])
    expected = {
        "forward-kl": kl_divergence(Bernoulli(p), Bernoulli(q)),
        "reverse-kl": kl_divergence(Bernoulli(q), Bernoulli(p)),
    }
    for name, value in expected.items():
        assert torch.allclose(LOSSES[name](q.log(), p.log()), value, atol=1e-5)
        certain = torch.zeros(1, requires_grad=True)
        LOSSES[name](certain, torch.zeros(1)).sum().backward()
        assert certain.grad.isfinite().all()  # type: ignore[union-attr]


# ---- teachers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: str) -> str:
    """Six decodes of training problems by a toy model."""
    output = str(tmp_path_factory.mktemp("teacher") / "eval")
    few: dict[str, Any] = {"limit": 6, "max_new_tokens": LENGTH, "split": "train", "trajectories": True}
    evaluate(EvalConfig(model=model, task=[TASK], decoder=["full:steps=8"], output=output, **few))
    return output


def config(output: Path, model: str, source: str, **changes: Any) -> DistillConfig:
    values: dict[str, Any] = {"model": model, "tasks": [TASK], "teacher": [source], "min_reward": 0.0, "problems": 6}
    values |= {"validation_problems": 3, "max_completion_length": LENGTH, "per_device_train_batch_size": 4}
    values |= {"max_steps": 4, "warmup_steps": 0, "learning_rate": 1e-3, "eval_steps": 2, "save_steps": 2}
    values |= {"bf16": False, "report_to": [], "rows_per_forward": 5}
    return DistillConfig(output_dir=str(output), **{**values, **changes})


def test_a_teachers_rows_are_filled_with_eos(tmp_path: Path, model: str, folder: str) -> None:
    t = DistillTrainer(model, config(tmp_path, model, folder))
    rows: Any = t.train_dataset
    assert len(rows) == 6 and rows[0]["task"].name == "countdown"
    records = read_lines(next((Path(folder) / "records").glob("*.jsonl")))
    for row, record in zip(rows, records, strict=True):
        own = Teacher.of([row], torch.device("cpu"))
        end = int(t.lm.lengths(own.tokens))
        assert t.lm.text(own.tokens) == [record["completion"]]
        assert (own.tokens[0, end + 1 :] == t.lm.eos_id).all() and (own.steps[0, end + 1 :] == LENGTH).all()
        assert own.steps[0, : end + 1].tolist() == record["steps"][: end + 1]


SETTINGS = [
    {"loss": "cross-entropy", "masked_weight": 0.3},
    {"loss": "forward-kl", "masked_weight": 0.0, "order": "teacher"},
    {"loss": "reverse-kl", "masked_weight": 1.0, "own_tokens": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("lora_r", [None, 2])
def test_loss_and_gradient_equal_a_plain_restatement(
    tmp_path: Path, model: str, folder: str, settings: dict[str, Any], lora_r: int | None
) -> None:
    """Rows, states, tokens in loops; every forward on one row without padding."""
    t = DistillTrainer(model, config(tmp_path, model, folder, lora_r=lora_r, **settings))
    rows: Any = [t.train_dataset[i] for i in range(4)]  # type: ignore[index]
    loss = t.training_step(t.model, rows)
    trained = [p for p in t.model.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in trained]  # type: ignore[union-attr]
    t.model.zero_grad()

    teacher = Teacher.of(rows, torch.device("cpu"))
    loop = GuidedLoop(t.lm, t.decoder, teacher, t.config.own_tokens, t.config.order == "teacher")
    seeds = torch.tensor([0, 2, 4, 6])
    with torch.no_grad():
        along = student_trajectory(t.lm, [row["prompt"] for row in rows], loop, seeds, 4)
    total = torch.zeros(())
    for b, row in enumerate(rows):
        prompt, parts, weights = t.lm.tokens(row["prompt"]), [], []
        for s in range(along.steps):
            logits = t.lm.model(input_ids=torch.tensor([prompt + along.state(s)[b].tolist()])).logits[0, len(prompt) :]
            logits[:, t.lm.mask_id] = -torch.inf
            for i in range(LENGTH):
                if (step := int(along.step[b, i])) >= s and (weight := 1.0 if step == s else t.config.masked_weight):
                    own = logits[i].log_softmax(-1)[teacher.tokens[b, i]]
                    parts.append(LOSSES[t.config.loss](own, teacher.logprobs[b, i]))
                    weights.append(weight)
        total = total + (torch.stack(parts) * torch.tensor(weights)).sum() / sum(weights) / len(rows)
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-4)
    total.backward()
    for mine, p in zip(gradients, trained, strict=True):
        assert torch.allclose(mine, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-7)  # type: ignore


def test_weights_of_a_row_sum_to_one(toy_lm: Any) -> None:
    found, _ = teacher_of(toy_lm, "eoser-ass")
    views, weights = state_views(found, 0.3)
    assert torch.allclose(torch.stack(weights).sum((0, 2)), torch.ones(4))
    assert all((w > 0).equal(v.scored) for w, v in zip(weights, views, strict=True))


def edited(folder: str, output: Path, **changes: Any) -> str:
    """A copy of a teacher whose records are changed."""
    shutil.copytree(folder, output)
    path = next((output / "records").glob("*.jsonl"))
    path.write_text("".join(json.dumps({**record, **changes}) + "\n" for record in read_lines(path)))
    return str(output)


FAULTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"min_reward": None}, "none of the teacher's 6 decodes of task countdown is solved: choose a better teacher"),
    ({}, {"min_reward": 2.0}, "none of the teacher's 6 decodes of task countdown has a reward of 2 or more"),
    ({}, {"tasks": [TASK, "sudoku:style=compact"]}, "none of the teacher's 0 decodes of task sudoku"),
    ({"completion": "other"}, {}, "has another tokenizer than .*; choose a teacher of the same family"),
    ({"tokens": [500] * LENGTH}, {}, "has another tokenizer"),
    ({}, {"max_completion_length": 16}, "has a canvas of 32 tokens, this run of 16"),
    ({}, {"tasks": ["sudoku:style=compact"]}, "decoded task countdown, which is not trained: add it to tasks"),
    ({"steps": "none"}, {}, "is damaged"),
]


@pytest.mark.parametrize(("changes", "settings", "message"), FAULTS)
def test_an_unfit_teacher_is_one_sentence(
    tmp_path: Path, model: str, folder: str, changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    teacher = edited(folder, tmp_path / "teacher", **changes)
    with pytest.raises(UserError, match=message):
        DistillTrainer(model, config(tmp_path / "run", model, teacher, **settings))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_what_is_no_teacher_is_refused(tmp_path: Path, model: str, folder: str) -> None:
    """Records of an unfinished evaluation may lie in shards, which would be left out without a word."""

    def refused(name: str, message: str, old: str = "", new: str = "") -> None:
        settings = tmp_path / name / "config.json"
        settings.write_text(settings.read_text().replace(old, new))
        with pytest.raises(UserError, match=message):
            DistillTrainer(model, config(tmp_path / "run", model, str(tmp_path / name)))

    for name in ("no_summary", "shard", "of_tests", "shots", "numbers"):
        edited(folder, tmp_path / name)
    (tmp_path / "no_summary" / "summary.json").unlink()
    (tmp_path / "shard" / "records" / "x.jsonl.rank-1").touch()
    refused("no_summary", "is an unfinished evaluation: give its command again")
    refused("shard", "is an unfinished evaluation")
    refused("of_tests", "decoded test problems with 0 worked examples", '"split": "train"', '"split": "test"')
    refused("shots", "decoded train problems with 2 worked examples", '"shots": 0', '"shots": 2')
    refused("numbers", "with numbers=4, this run 3: set both alike", '"numbers": 3', '"numbers": 4')


def test_only_what_is_right_is_learned(tmp_path: Path, model: str, folder: str) -> None:
    teacher = edited(folder, tmp_path / "teacher")
    path = next((tmp_path / "teacher" / "records").glob("*.jsonl"))
    records = read_lines(path)
    path.write_text("".join(json.dumps({**r, "solved": r["index"] in (1, 4)}) + "\n" for r in records))
    rows: Any = DistillTrainer(model, config(tmp_path / "run", model, teacher, min_reward=None)).train_dataset
    assert [row["prompt"] for row in rows] == [records[i]["prompt"] for i in (1, 4)]
    assert rows[1]["teacher"]["tokens"][:5] == records[4]["tokens"][:5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"teacher": []}, "teacher is empty"),
        ({"teacher": ["runs/nowhere"]}, "teacher runs/nowhere is no folder of an evaluation: make it with unmask eval"),
        ({"trainer_args": {"load_best_model_at_end": True}}, "set it among the run's own"),
        ({"masked_weight": 2.0}, "masked_weight is 2.0"),
        ({"decoder": "full:steps=64"}, "64 steps for a canvas of 32 tokens"),
        ({"decoder": "threshold:block_length=8", "order": "teacher"}, "set order=student"),
        ({"load_best_model_at_end": True, "save_steps": 4}, "set both alike"),
    ],
)
def test_wrong_settings_name_the_fix(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(tmp_path, "tiny", "full", **settings)


# ---- whole runs --------------------------------------------------------------------------------------------------------


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, model: str, folder: str, capsys: Any) -> None:
    """kill -9 behind a checkpoint; metrics and weights are the same to the bit."""
    settings = {"own_tokens": 0.3, "decoder": "eoser-ass:temperature=1", "max_steps": 5}
    train(config(tmp_path / "whole", model, folder, **settings))
    save_config(config(tmp_path / "part", model, folder, **settings), tmp_path / "part.yaml")
    metrics, deadline = tmp_path / "part" / "metrics.jsonl", time.time() + 200
    process = start(["-m", "unmask", "distill", str(tmp_path / "part.yaml")], tmp_path)
    while process.poll() is None and time.time() < deadline and not any(e["step"] >= 3 for e in read_lines(metrics)):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(100)
    assert main(["distill", str(tmp_path / "part.yaml")]) == 0
    for name in ("metrics.jsonl", "final/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()
    lines = read_lines(metrics)
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 2, 4, 5]
    assert {"agreement", "nfe", "loss"} <= lines[1].keys()
    report([str(tmp_path / "whole")])
    assert re.search(
        r"\| whole \| distill \| eoser-ass:temperature=1 \| countdown \|.*\| 5 \| 20 \|", capsys.readouterr().out
    )


def test_two_processes_make_one_processs_teacher_and_weights(tmp_path: Path, model: str) -> None:
    drawn = {"own_tokens": 0.3, "decoder": "eoser-ass:temperature=1"}
    runs: dict[str, dict[str, Any]] = {"one": drawn, "two": {**drawn, "per_device_train_batch_size": 2}}
    for name, changes in runs.items():
        save_config(config(tmp_path / name, model, "full:steps=8", **changes), tmp_path / f"{name}.yaml")
    assert main(["distill", str(tmp_path / "one.yaml")]) == 0
    process = start(["-m", "unmask", "distill", str(tmp_path / "two.yaml")], tmp_path, processes=2)
    assert process.wait(120) == 0, process.stdout and process.stdout.read()
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in runs)
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    texts = [read_lines(next((tmp_path / n / "teacher" / "records").glob("*.jsonl"))) for n in runs]
    assert [r["tokens"] for r in texts[0]] == [r["tokens"] for r in texts[1]]


def test_the_command_makes_its_own_teacher(tmp_path: Path, toy_lm: Any, capsys: Any) -> None:
    model, file = saved(toy_lm, tmp_path / "toy"), str(tmp_path / "run.yaml")
    save_config(config(tmp_path / "run", model, "full:steps=8", max_steps=2, load_best_model_at_end=True), Path(file))
    assert main(["distill", file]) == 0 and "checkpoint" in capsys.readouterr().out
    records = next((tmp_path / "run" / "teacher" / "records").glob("*.jsonl"))
    before = records.read_bytes()
    assert main(["distill", file]) == 0 and records.read_bytes() == before  # a second time: what is there stays
    folder = str(tmp_path / "run" / "teacher")
    for flags, message in (
        (["--teacher", "full", folder], "mixes folders and decoders"),
        (["--teacher", "full:steps=4"], "holds the decodes of another teacher: remove it"),
        (["--problems", "9"], "holds the decodes of another teacher"),
        (["--reward-weights", "1", "2"], "2 reward_weights for the reward functions"),
        (["--teacher", "full:max_new_tokens=64"], "has a canvas of 64 tokens, this run of 32"),
        (["--seed", "1"], "results with other seed"),
    ):
        assert main(["distill", file, *flags]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_stays_and_is_final(
    tmp_path: Path, model: str, folder: str, monkeypatch: Any, limit: int
) -> None:
    rewards = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5])
    report = DistillTrainer.report

    def as_wished(self: Any, metrics: dict[str, float]) -> dict[str, float]:
        return report(self, {**metrics, "eval_reward": next(rewards)})

    monkeypatch.setattr(DistillTrainer, "report", as_wished)
    monkeypatch.chdir(tmp_path)
    every = {"eval_steps": 1, "save_steps": 1, "max_steps": 5, "load_best_model_at_end": True}
    train(config(Path("./runs/../run"), model, folder, trainer_args={"save_total_limit": limit}, **every))
    kept = {int(p.name.partition("-")[2]) for p in Path("run").glob("checkpoint-*")}
    assert kept == {2, *range(6 - limit, 6)}
    best, final = ((Path("run") / name / "model.safetensors").read_bytes() for name in ("checkpoint-2", "final"))
    assert best == final and "Validation after update 2" in Path("run/final/README.md").read_text()


def test_recipes_of_the_shipped_models(tmp_path: Path, model: str, folder: str) -> None:
    """An update each on a toy model: distillation, reinforcement behind it, and a third task in two wordings."""
    small: dict[str, Any] = {"model": model, "max_steps": 1, "eval_steps": 1, "save_steps": 1, "compile": False}
    small |= {"report_to": [], "validation_problems": 1, "bf16": False, "output_dir": str(tmp_path / "run")}
    on = {**small, "problems": 6, "max_completion_length": LENGTH, "tasks": [TASK], "rows_per_forward": 8}
    distill = read_config(DistillConfig, TINY / "distill.yaml", ["--teacher", folder])
    assert distill.tasks == ["sudoku", "countdown"] and distill.decoder == "eoser-ass"
    train(replace(distill, **on, min_reward=0.0, per_device_train_batch_size=2))
    fast = read_config(DiffusionGRPOConfig, TINY / "fast.yaml")
    assert fast.model == "runs/fast/sudoku/final" and fast.tasks == ["countdown"]
    tasks = {"tasks": [TASK, "sudoku:style=compact"], "output_dir": str(tmp_path / "rl")}
    train_rl(replace(fast, **{**on, **tasks}, per_device_train_batch_size=8))
    three = read_config(SFTConfig, TINY / "three.yaml")
    assert len(three.tasks) == 6 and "chain_sum" in three.task_defaults
    sft = {**small, "output_dir": str(tmp_path / "sft"), "problems": [4], "per_device_train_batch_size": 2}
    final = load(
        str(train_sft(replace(three, **sft, task_defaults={**three.task_defaults, "countdown": {"max_value": 6}})))
    )
    assert final.task_defaults["countdown"] == {"style": "compact", "max_value": 6}
