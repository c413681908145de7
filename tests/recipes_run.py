"""``recipes_run.py MODEL DATA OUTPUT FILE…``: two updates of each recipe, one after the other, in one launch."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from unmask import DiffusionGRPOConfig, SFTConfig
from unmask.config import read_config
from unmask.rl.run import train as train_rl
from unmask.training.sft import train as train_sft

SMALL: dict[str, Any] = {"report_to": [], "lora_r": 2, "eval_steps": 2, "save_steps": 2, "max_steps": 2}


def small_rl(file: Path, model: str, data: Path, output: Path) -> DiffusionGRPOConfig:
    """A recipe with everything that its 8B model and 8 GPUs are for made small; the rest as it stands."""
    config = read_config(DiffusionGRPOConfig, file)
    (task,) = config.tasks
    if (name := task.partition(":")[0]) in ("gsm8k", "math500"):
        task += f"{',' if ':' in task else ':'}data={data / name}"
    sizes: dict[str, Any] = {"problems": 4, "validation_problems": 2, "max_completion_length": 16}
    sizes |= {"per_device_train_batch_size": 6, "output_dir": str(output), "model": model, "tasks": [task]}
    if "block_length" in config.decoder:
        sizes["decoder"] = "semi-ar:block_length=8"
    return dataclasses.replace(config, **SMALL, **sizes)


def small_sft(file: Path, model: str, data: Path, output: Path) -> SFTConfig:
    sizes: dict[str, Any] = {"max_length": 256, "num_train_epochs": None, "validation_share": 0.25}
    sizes |= {"data": str(data / "s1k.jsonl"), "output_dir": str(output), "model": model}
    return dataclasses.replace(read_config(SFTConfig, file), **SMALL, **sizes)


if __name__ == "__main__":
    model, data, output, *files = sys.argv[1:]
    for file in map(Path, files):
        folder = Path(output) / file.stem
        if file.stem.startswith("sft"):
            train_sft(small_sft(file, model, Path(data), folder))
        else:
            train_rl(small_rl(file, model, Path(data), folder))
