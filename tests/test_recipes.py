"""Every recipe of configs/llada: its numbers, its dry run, and two updates on a small random LLaDA in two processes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import write_llada
from test_sft_data import write
from unmask import DiffusionGRPOConfig, DiffusionGRPOTrainer, DistillConfig, SFTConfig, load
from unmask.cli import main
from unmask.config import read_config, save_config
from unmask.evaluation.command import decode_teacher
from unmask.io.files import read_lines
from unmask.rl.distill import train as train_distill
from unmask.rl.dry_run import dry_run
from unmask.rl.objectives import ViewRows
from unmask.rl.run import train as train_rl
from unmask.training.sft import train as train_sft

CONFIGS = Path(__file__).parent.parent / "configs" / "llada"
RECIPES = sorted(f for f in CONFIGS.glob("*.yaml") if not f.name.startswith("_"))
DISTILL = [f for f in RECIPES if f.name.startswith("distill")]
LATER = [f for f in RECIPES if f.name.startswith(("espo", "gdpo", "spg", "justgrpo", "agrpo", "tracerl"))]
RL = [f for f in RECIPES if not f.name.startswith(("sft", "distill", "vrpo")) and f not in LATER]
RUN = [CONFIGS / f"{name}.yaml" for name in ("cj_gsm8k", "coupled_math", "sft_s1k", "distill_gsm8k")]
SMALL: dict[str, Any] = {"report_to": [], "lora_r": 2, "eval_steps": 2, "save_steps": 2, "max_steps": 2}


def small_rl(file: Path, model: str, data: Path, output: Path, kind: Any = DiffusionGRPOConfig) -> Any:
    """A recipe with everything that its 8B model and 8 GPUs are for made small; the rest as it is."""
    config = read_config(kind, file)
    (task,) = config.tasks
    if (name := task.partition(":")[0]) in ("gsm8k", "math500"):
        task += f"{',' if ':' in task else ':'}data={data / name}"
    sizes: dict[str, Any] = {"problems": 4, "validation_problems": 2, "max_completion_length": 16}
    sizes |= {"per_device_train_batch_size": 6, "output_dir": str(output), "model": model, "tasks": [task]}
    if "block_length" in config.decoder:
        sizes["decoder"] = "semi-ar:block_length=8"
    if isinstance(config, DiffusionGRPOConfig):
        sizes["num_generations"] = min(config.num_generations, 6)
    if getattr(config, "objective", None) == "justgrpo":
        sizes["decoder"] = "semi-ar:block_length=1,steps=16"
    return dataclasses.replace(config, **SMALL, **sizes)


def small_distill(file: Path, model: str, data: Path, output: Path) -> DistillConfig:
    """Learns from any decode: a random model has no right ones."""
    config = small_rl(file, model, data, output, DistillConfig)
    return dataclasses.replace(config, min_reward=-1.0, teacher=["full:steps=4"], warmup_steps=0)


def small_sft(file: Path, model: str, data: Path, output: Path) -> SFTConfig:
    sizes: dict[str, Any] = {"max_length": 256, "num_train_epochs": None, "validation_share": 0.25}
    sizes |= {"data": str(data / "s1k.jsonl"), "output_dir": str(output), "model": model}
    return dataclasses.replace(read_config(SFTConfig, file), **SMALL, **sizes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up problems in the published forms, enough that the hash gives some to either split."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("gsm8k", "math500"):
        (folder / name).mkdir()
    counts = [(n, f"Ann has {n} pens and buys {n + 1} more. How many has she now?") for n in range(80)]
    rows = [{"question": q, "answer": f"{n} + {n + 1}\n#### {2 * n + 1}"} for n, q in counts]
    write(folder / "gsm8k" / "train.jsonl", *rows)
    rows = [{"problem": q, "solution": f"\\boxed{{{2 * n + 1}}}"} for n, q in counts]
    write(folder / "math500" / "train.jsonl", *rows)
    rows = [{"question": q, "thinking_trajectories": ["count"], "attempt": str(n)} for n, q in counts[:24]]
    write(folder / "s1k.jsonl", *rows)
    return folder


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_llada(tmp_path_factory.mktemp("llada"), max_sequence_length=2048)


def test_the_grid_is_whole_and_has_the_published_numbers() -> None:
    tasks = ("countdown", "sudoku", "gsm8k", "math")
    names = {f"{objective}_{task}" for objective in ("cj", "diffu", "one_step", "coupled") for task in tasks}
    assert {f.stem for f in RL} == names and {f.stem for f in DISTILL} == {f"distill_{task}" for task in tasks}
    assert len(RECIPES) == len(RL) + len(DISTILL) + len(LATER) + 2 and len(LATER) == 6
    assert read_config(DiffusionGRPOConfig, CONFIGS / "vrpo.yaml").objective == "vrpo"
    for file in DISTILL:
        distill = read_config(DistillConfig, file)
        assert distill.tasks[0] == {"distill_math": "math500"}.get(file.stem, file.stem.removeprefix("distill_"))
        assert (
            distill.output_dir == f"runs/llada/{file.stem}" and distill.lora_r == 128 and distill.decoder == "eoser-ass"
        )
    for file in RL:
        c = read_config(DiffusionGRPOConfig, file)
        objective, _, task = file.stem.rpartition("_")
        assert c.objective == objective.replace("_", "-") and c.output_dir == f"runs/llada/{file.stem}"
        assert c.tasks[0].partition(":")[0] == {"math": "math500"}.get(task, task)
        assert c.num_iterations == (12 if task in ("gsm8k", "math") else 8)
        assert (c.num_generations, c.per_device_train_batch_size, c.rows_per_forward) == (6, 12, 6)
        assert (c.epsilon, c.beta, c.temperature, c.learning_rate) == (0.5, 0.04, 1.0, 3e-6)
        assert (c.lora_r, c.lora_alpha, c.weight_decay, c.adam_beta2, c.max_grad_norm) == (128, 64, 0.1, 0.99, 0.2)
        assert c.max_steps % c.num_iterations == c.save_steps % c.num_iterations == 0
        assert c.decoder == ("eoser-ass" if objective == "cj" else "semi-ar:block_length=32")
        assert c.model == "GSAI-ML/LLaDA-8B-Instruct" and c.max_completion_length == 128 and c.bf16


def test_two_updates_on_two_processes(llada: str, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [__file__, llada, str(data), str(tmp_path), *map(str, RUN)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for file in RUN:
        assert load(str(tmp_path / file.stem / "final"), "float32").self_test()
        if not file.stem.startswith("sft"):
            lines = read_lines(tmp_path / file.stem / "metrics.jsonl")
            assert [x["step"] for x in lines if "loss" in x] == [1, 2]


DRY = [("cj_math", ""), ("diffu_gsm8k", ""), ("coupled_sudoku", ",cfg_scale=0.5"), *((f.stem, "") for f in LATER)]


@pytest.mark.parametrize(("name", "cfg"), DRY)
def test_dry_runs_say_what_the_trainer_does(name: str, cfg: str, llada: str, data: Path, tmp_path: Path) -> None:
    c = small_rl(CONFIGS / f"{name}.yaml", llada, data, tmp_path / "run")
    c = dataclasses.replace(c, rows_per_forward=4, decoder=c.decoder + cfg)
    said = dry_run(c)
    assert not (tmp_path / "run").exists()
    trainer = DiffusionGRPOTrainer(llada, None, c)
    rollout = trainer.sample([trainer.train_dataset[0]])  # type: ignore[index]
    views = trainer.views(rollout, 0)
    passes = len(trainer.microbatches(ViewRows.of(views), torch.ones(6, dtype=torch.bool)))
    assert f"{len(views)} views × 6 rows: {passes} forward and backward passes of up to {8 if cfg else 4} rows" in said
    assert f"NFE {int(rollout.trajectory.nfe.max())} a completion" in said
    assert "1 processes × 6 completions = 6 an update: 1 prompts × 6" in said
    mu, objective = c.num_iterations, trainer.objective
    scored = passes * (mu if objective.fresh else 1)  # fresh views are scored for each update
    old = 0 if c.uses_recorded or mu == 1 or objective.reads == "policy" else scored
    reference = scored * (c.beta > 0)
    joint = (
        0 if objective.loss is None else passes * (mu if objective.reads == "policy" else mu - 1)
    )  # the old policy's serve at first
    assert f"{old} forward passes for the old policy, {reference} for the reference, {joint} for the loss" in said
    assert "GiB a process" in said


def test_dry_run_on_the_command_line(llada: str, data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    save_config(small_rl(RUN[0], llada, data, tmp_path / "run"), tmp_path / "c.yaml")
    assert main(["rl", str(tmp_path / "c.yaml"), "--dry-run", "--beta", "0"]) == 0
    out = capsys.readouterr().out
    assert "8 processes × 6 completions = 48 an update: 8 prompts × 6" in out and "beta: 0.0" in out
    assert "0 for the reference" in out
    assert main(["rl", "--dry-run", str(tmp_path / "c.yaml")]) == 0
    for flags, message in (
        (["--per-device-train-batch-size", "7"], "does not divide"),
        (["--lora-target-modules", "(("], "does not fit the model"),
        (["--validation-problems", "5000"], "validation problems"),
        (["--lora-r", "None"], "would be trained in bfloat16"),
    ):
        assert main(["rl", str(tmp_path / "c.yaml"), "--dry-run", *flags]) == 2
        assert message in capsys.readouterr().err


if __name__ == "__main__":  # MODEL DATA OUTPUT FILE…: two updates of each recipe, one after the other, in one launch
    model, data, output, *files = sys.argv[1:]
    for file in map(Path, files):
        folder = Path(output) / file.stem
        if file.stem.startswith("sft"):
            train_sft(small_sft(file, model, Path(data), folder))
        elif file.stem.startswith("distill"):
            distill = small_distill(file, model, Path(data), folder)
            decode_teacher(distill)
            train_distill(distill)
        else:
            train_rl(small_rl(file, model, Path(data), folder))
