"""Whole runs of ``unmask rl``: folder, killed and resumed, several processes, report, export, every configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers.utils import logging

from benchmarks.report.command import command as report
from conftest import saved, toy
from unmask import DiffusionGRPOConfig, SFTConfig, UserError, load
from unmask.cli import main
from unmask.config import read_config, save_config
from unmask.io.files import read_lines
from unmask.models import bidirectional, llada
from unmask.rl.objectives import OBJECTIVES
from unmask.rl.run import train

CONFIGS = Path(__file__).parent.parent / "configs"
TASKS = ["sudoku:style=compact", "countdown:style=compact,max_value=6"]


def config(output: Path, model: str, **changes: Any) -> DiffusionGRPOConfig:
    values: dict[str, Any] = {"model": model, "tasks": TASKS, "reward_funcs": ["rewards_for_tests:digits"]}
    values |= {"problems": 6, "validation_problems": 3, "max_completion_length": 16, "per_device_train_batch_size": 8}
    values |= {"num_generations": 4, "num_iterations": 2, "max_steps": 5, "learning_rate": 1e-3, "beta": 0.01}
    values |= {"eval_steps": 3, "save_steps": 1, "bf16": False, "report_to": []}
    return DiffusionGRPOConfig(output_dir=str(output), **{**values, **changes})


OWN_OBJECTIVES = [*OBJECTIVES]  # before a test adds one
ENGINES = ["ddp", "fsdp2", *(["zero2"] if find_spec("deepspeed") else [])]
ON_CPU: dict[str, Any] = {"ddp": {}, "fsdp2": {}, "zero2": {"use_cpu": False, "ddp_backend": "gloo"}}
"""``trainer_args`` by engine. (DeepSpeed is tested where it is installed.)"""

REWARDS = """
import os


def digits(prompts, completions, **_):
    return [sum(c in "aeiou0123456789" for c in text) / 10 for text in completions]


def some(prompts, completions, **_):
    return [v * (sum(map(ord, p)) % 2) for v, p in zip(digits(prompts, completions), prompts)]


def dies(prompts, completions, **_):
    os._exit(9) if os.environ.get("RANK") == "1" else None
    return digits(prompts, completions)
"""


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of reward functions, and the working folder of every process that a test starts."""
    (tmp_path / "rewards_for_tests.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def offline(folder: Path) -> dict[str, Any]:
    """Settings that learn from a file of pairs, which this writes."""
    pairs = [{"prompt": f"make {n}", "chosen": f"{n} is it", "rejected": f"no {n}"} for n in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    own: dict[str, Any] = {"num_generations": 2, "num_iterations": 1, "pairs": str(folder / "pairs.jsonl"), "beta": 0.2}
    return {**own, "reward_funcs": [], "tasks": []}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def write(path: Path, c: DiffusionGRPOConfig) -> str:
    save_config(c, path)
    return str(path)


def start(arguments: list[str], folder: Path, processes: int = 1) -> subprocess.Popen[str]:
    """``python ARGUMENTS``, or that under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **options)


def test_a_run_leaves_what_it_promises(rewards: Path, toy_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    final = train(config(rewards / "run", toy_folder))
    lines = read_lines(rewards / "run" / "metrics.jsonl")
    assert [e["step"] for e in lines if "loss" in e] == [1, 2, 3, 4, 5]
    assert [e["step"] for e in lines if "eval_reward" in e] == [0, 3, 5]  # before, on the way, at the end
    sampled = [e for e in lines if "reward" in e]
    assert [e["step"] for e in sampled] == [1, 3, 5]  # a rollout serves two updates
    assert all(e["nfe"] == 4 and 0 <= e["logprob_mismatch"] < 1e-4 for e in sampled)  # log2(16) passes
    assert all({"kl", "clip_fraction", "entropy", "ratio", "grad_norm"} <= set(e) for e in lines if "loss" in e)
    kl = [e["kl"] for e in lines if "kl" in e]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0
    completions = read_lines(rewards / "run" / "completions.jsonl")
    assert len(completions) == 3 * 4 and {"prompt", "completion", "reward", "advantage", "step"} == set(completions[0])
    kept = {p.name: (p / "rollout-0.safetensors").exists() for p in (rewards / "run").glob("checkpoint-*")}
    assert kept == {"checkpoint-4": False, "checkpoint-5": True}  # only where a rollout is still in use
    before, after = load(toy_folder), load(str(final))
    assert any(not torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    said = capsys.readouterr()
    assert "'eval_reward': " in said.out and "'logprob_mismatch': " in said.out  # a log file gets every line
    assert "Writing" not in said.err and logging.is_progress_bar_enabled()  # and no bar; the caller's setting is kept
    assert main(["export", str(final), str(rewards)]) == 2  # never overwrites
    report([str(rewards / "run")])
    assert "| countdown |" in capsys.readouterr().out
    train(config(rewards / "run", toy_folder))  # a finished run is only finished again
    assert read_lines(rewards / "run" / "metrics.jsonl") == lines
    with pytest.raises(UserError, match="run with other objective, beta"):
        train(config(rewards / "run", toy_folder, beta=0.0, objective="diffu"))


def test_killed_and_resumed_equals_uninterrupted(rewards: Path, toy_folder: str) -> None:
    """kill -9 between inner iterations; metrics and weights are the same to the bit."""
    # Of every two updates one is saved, so that a killed run has written lines that its checkpoint does not know.
    settings: dict[str, Any] = {"num_iterations": 3, "save_steps": 2, "max_steps": 7, "objective": "diffu"}
    train(config(rewards / "whole", toy_folder, **settings))
    file = write(rewards / "part.yaml", config(rewards / "part", toy_folder, **settings))
    metrics = rewards / "part" / "metrics.jsonl"
    process = start(["-m", "unmask", "rl", file], rewards)
    deadline = time.time() + 300
    while process.poll() is None and time.time() < deadline and not any(e["step"] >= 3 for e in read_lines(metrics)):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(200)
    assert main(["rl", file]) == 0
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert (rewards / "part" / name).read_bytes() == (rewards / "whole" / name).read_bytes()
    a, b = weights(rewards / "whole"), weights(rewards / "part")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("objective", OWN_OBJECTIVES)
def test_resumed_between_inner_iterations_equals_uninterrupted(
    objective: str, rewards: Path, toy_folder: str, tmp_path: Path
) -> None:
    """Every objective, from the second of three updates of one rollout: metrics and weights are the same to the bit.

    ``vrpo``, which samples nothing, from the second of three updates.
    """
    own = {"justgrpo": {"decoder": "semi-ar:block_length=1"}, "spg": {"beta": 0.0}, "vrpo": offline(rewards)}
    changes = {"objective": objective, "num_iterations": 3, "max_steps": 3, **own.get(objective, {})}
    settings = config(tmp_path / "run", toy_folder, **changes)
    train(settings)
    whole, metrics = weights(tmp_path / "run"), read_lines(tmp_path / "run" / "metrics.jsonl")
    for made in ("final", "checkpoint-3"):
        shutil.rmtree(tmp_path / "run" / made)
    train(settings)
    again = weights(tmp_path / "run")
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == metrics
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_two_processes_equal_one(rewards: Path, toy_folder: str) -> None:
    """The same global batch on one process and on two (gloo): the same parameters after five updates.

    Half the groups have no variance, so the ranks have different numbers of forward passes of their own; rows of a block-causal
    model take different numbers of steps too.
    """
    settings: dict[str, Any] = {"save_steps": 5, "rows_per_forward": 2, "reward_funcs": ["rewards_for_tests:some"]}
    settings["learning_rate"] = 1e-4
    in_blocks = {
        "model": saved(toy(block_length=8), rewards / "blocks"),
        "decoder": "threshold:block_length=8,threshold=0.3",
    }
    # AdamW follows the sign of gradients that are no more than rounding: the smaller the rate, the less that weighs.
    of_rows = {
        "espo": {"objective": "espo", "beta": 0.1, "learning_rate": 3e-5},
        "spg": {"objective": "spg:block_length=8", "beta": 0.0},
    }
    kinds = {"cj": {}, "coupled": {"objective": "coupled"}, **of_rows, "blocks": in_blocks}

    def runs(name: str, batch_size: int) -> dict[str, DiffusionGRPOConfig]:
        settings["per_device_train_batch_size"] = batch_size
        return {
            k: config(rewards / f"{name}-{k}", **{"model": toy_folder, **settings, **own}) for k, own in kinds.items()
        }

    (rewards / "all.py").write_text("import sys; from unmask.cli import main; [main(['rl', f]) for f in sys.argv[1:]]")
    # Groups that each rank replaces by itself depend on the number of ranks: no equality, but it must not hang.
    dynamic = config(rewards / "dynamic", toy_folder, max_resamples=2, **{**settings, "max_steps": 2, "save_steps": 2})
    files = [write(rewards / f"{o}.yaml", c) for o, c in {**runs("two", 8), "dynamic": dynamic}.items()]
    process = start([str(rewards / "all.py"), *files], rewards, processes=2)
    for one in runs("one", 16).values():
        train(one)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for kind in kinds:
        one, two = (rewards / f"{n}-{kind}" for n in ("one", "two"))
        a, b = weights(one), weights(two)
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5
        for x, y in zip(read_lines(one / "metrics.jsonl"), read_lines(two / "metrics.jsonl"), strict=True):
            assert x.keys() == y.keys()
            kept = (k for k in x if k not in ("loss", "logprob_mismatch"))
            assert all(x[k] == pytest.approx(y[k], rel=1e-3, abs=1e-5) for k in kept)
    sampled = [e for e in read_lines(rewards / "dynamic" / "metrics.jsonl") if "groups_replaced" in e]
    assert sampled and all(e["samples_per_completion"] > 1 and e["groups_replaced"] > 0 for e in sampled)


def test_engines_equal_one_process(rewards: Path, toy_folder: str) -> None:
    """Each engine on two processes: all weights, an adapter, every objective, bfloat16, supervised; resumed in between.

    Under FSDP2 a head that is a black box fails, and the reference policy is sharded as the policy is. Supervised noise is
    drawn for each rank, so there DDP is what the others equal. An adapter stays in float32.
    """
    some: dict[str, Any] = {"reward_funcs": ["rewards_for_tests:some"], "learning_rate": 1e-4, "save_steps": 5}
    whole = {**some, "save_steps": 1, "num_iterations": 3, "rows_per_forward": 2}
    # AdamW's first step follows the sign of gradients that are mere rounding: the smaller the rate, the less that weighs.
    espo = {**some, "objective": "espo", "learning_rate": 3e-5}
    kinds = {"lora": {**some, "lora_r": 4}, "espo": espo, "whole": whole}
    # One step of plain descent for each of the others.
    descent = {**some, "max_steps": 1, "trainer_args": {"optim": "sgd"}, "learning_rate": 1.0, "beta": 0.0}
    kinds |= {name: {**descent, "objective": name} for name in OWN_OBJECTIVES if name not in ("cj", "espo")}
    kinds["justgrpo"]["decoder"] = "semi-ar:block_length=1"
    kinds["vrpo"] |= offline(rewards)
    adapted = {**some, "lora_r": 4, "dtype": "bfloat16", "bf16": True, "rows_per_forward": 2, "max_steps": 2}
    alone = {"bf16": {"bf16": True, "max_steps": 1}, "adapted": adapted, "resumed": whole}
    uneven = {"decoder": "threshold:block_length=8,threshold=0.3", "max_resamples": 2, "max_steps": 2}
    started = []
    for engine in ENGINES:
        arguments = []
        for kind, own in {**kinds, **({} if engine == "fsdp2" else {"uneven": uneven}), **alone}.items():
            own = {**own, "trainer_args": {**own.get("trainer_args", {}), **ON_CPU[engine]}}
            c = config(rewards / f"{engine}-{kind}", toy_folder, **own)
            arguments.append(f"rl={write(rewards / f'{engine}-{kind}.yaml', c)}")
        arguments += [f"cut={rewards / f'{engine}-resumed'}", arguments[-1]]
        values: dict[str, Any] = {"problems": [32], "canvas": [96], "max_steps": 4, "save_steps": 2, "bf16": False}
        values |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
        values |= {"validation_problems": 4, "trainer_args": ON_CPU[engine]}
        sft = SFTConfig(
            output_dir=str(rewards / f"{engine}-sft"), model=toy_folder, tasks=TASKS, report_to=[], **values
        )
        save_config(sft, rewards / f"{engine}-sft.yaml")
        arguments.append(f"sft={rewards / f'{engine}-sft.yaml'}")
        if engine != "ddp":
            arguments += [f"cut={rewards / f'{engine}-sft'}", arguments[-1]]
        started.append(start([str(Path(__file__).parent / "engine.py"), engine, *arguments], rewards, processes=2))
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    def differ(one: str, other: str) -> float:
        a, b = weights(rewards / one), weights(rewards / other)
        assert a.keys() == b.keys()
        return max(float((a[k] - b[k]).abs().max()) for k in a)

    for kind, own in kinds.items():
        train(config(rewards / f"one-{kind}", toy_folder, per_device_train_batch_size=16, **own))
    for engine in ENGINES:
        found = {kind: differ(f"one-{kind}", f"{engine}-{kind}") for kind in kinds}
        assert max(found.values()) < 1e-5, (engine, found)
        assert differ(f"{engine}-whole", f"{engine}-resumed") == 0
        first = next(e for e in read_lines(rewards / f"{engine}-bf16" / "metrics.jsonl") if "kl" in e)
        assert first["kl"] == 0 and first["logprob_mismatch"] < 1e-6
        adapter = load_file(rewards / f"{engine}-adapted" / "checkpoint-2" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
        assert differ("ddp-sft", f"{engine}-sft") < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_lost_rank_ends_the_run(engine: str, rewards: Path, toy_folder: str) -> None:
    own: dict[str, Any] = {"reward_funcs": ["rewards_for_tests:dies"], "max_steps": 50, "save_steps": 50}
    c = config(rewards / "run", toy_folder, trainer_args=ON_CPU[engine], **own)
    script = str(Path(__file__).parent / "engine.py")
    process = start([script, engine, f"rl={write(rewards / 'c.yaml', c)}"], rewards, processes=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode not in (0, None) and "exitcode" in output


def test_mistakes_on_the_command_line(rewards: Path, toy_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(rewards / "c.yaml", config(rewards / "run", toy_folder))
    for flags, message in (
        (["--reward-funcs", "rewards_for_tests:nothing"], "cannot import"),
        (["--attn-implementation", "flash"], "eager"),
        (["--dtype", "bfloat16"], "would be trained in bfloat16"),
        (["--output-dir", "/proc/nothing"], "cannot write to /proc/nothing"),
    ):
        assert main(["rl", file, *flags]) == 2
        assert message in capsys.readouterr().err
        assert not (rewards / "run").exists()


def tiny(name: str) -> DiffusionGRPOConfig:
    return read_config(DiffusionGRPOConfig, CONFIGS / "tiny" / f"{name}.yaml")


@pytest.mark.parametrize("name", ["cj_sudoku", "coupled_countdown"])
def test_rl_configs_of_the_shipped_model_run(name: str, tmp_path: Path, toy_folder: str) -> None:
    """Two updates on a toy model."""
    c = tiny(name)
    sizes: dict[str, Any] = {"problems": 4, "validation_problems": 2, "max_completion_length": 16, "max_steps": 2}
    sizes |= {"per_device_train_batch_size": c.num_generations, "compile": False, "report_to": [], "model": toy_folder}
    sizes |= {"output_dir": str(tmp_path / "run"), "tasks": [f"{task}:style=compact" for task in c.tasks]}
    final = train(dataclasses.replace(c, **sizes))
    assert (final / "model.safetensors").exists() and read_lines(tmp_path / "run" / "metrics.jsonl")


def test_the_grid_of_configs_differs_in_what_it_names() -> None:
    for task in ("sudoku", "countdown"):
        first = tiny(f"cj_{task}")
        for objective in ("cj", "one-step", "diffu", "coupled"):
            c = tiny(f"{objective.replace('-', '_')}_{task}")
            assert c.tasks == [task] and c == dataclasses.replace(first, objective=objective, output_dir=c.output_dir)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "two_nodes"])
def test_distributed_configs_load(name: str) -> None:
    """accelerate reads them without complaint; what FSDP wraps by default are the blocks of every family."""
    found = load_config_from_file(str(CONFIGS / "distributed" / f"{name}.yaml"))
    assert found.num_processes == 8 * found.num_machines and found.mixed_precision == "no"
    if name == "fsdp2":
        assert "fsdp_transformer_layer_cls_to_wrap" not in found.fsdp_config
        for family in (llada.LLaDAModelLM, *bidirectional.MODELS):
            assert any(name.endswith(("Block", "DecoderLayer")) for name in family._no_split_modules)
