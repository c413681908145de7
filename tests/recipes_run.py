"""``recipes_run.py MODEL DATA OUTPUT FILE…``: two updates of each recipe, one after the other, in one launch."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from unmask.config import read_config
from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.run import train as train_rl
from unmask.training.config import SFTConfig
from unmask.training.sft import train as train_sft

SMALL = {"report_to": [], "lora_r": 2, "eval_steps": 2, "save_steps": 2}


def small_rl(file: Path, model: str, data: Path, output: Path) -> DiffusionGRPOConfig:
    """A recipe with everything that its 8B model and 8 GPUs are for made small; the rest as it stands."""
    config = read_config(DiffusionGRPOConfig, file)
    word = {"gsm8k": "gsm8k", "math500": "math500"}
    name = config.tasks[0].partition(":")[0]
    task = config.tasks[0] + (f"{',' if ':' in config.tasks[0] else ':'}data={data / name}" if name in word else "")
    sizes = {"problems": 4, "validation_problems": 2, "max_completion_length": 16, "per_device_train_batch_size": 6, "max_steps": 2}
    if "block_length" in config.decoder:
        sizes["decoder"] = "semi-ar:block_length=8"
    return dataclasses.replace(config, output_dir=str(output), model=model, tasks=[task], **SMALL, **sizes)


def small_sft(file: Path, model: str, data: Path, output: Path) -> SFTConfig:
    config = read_config(SFTConfig, file)
    sizes = {"max_length": 256, "num_train_epochs": None, "max_steps": 2, "validation_share": 0.25, "data": str(data / "s1k.jsonl")}
    return dataclasses.replace(config, output_dir=str(output), model=model, **SMALL, **sizes)


if __name__ == "__main__":
    model, data, output, *files = sys.argv[1:]
    for file in map(Path, files):
        folder = Path(output) / file.stem
        if file.stem.startswith("sft"):
            train_sft(small_sft(file, model, Path(data), folder))
        else:
            train_rl(small_rl(file, model, Path(data), folder))
