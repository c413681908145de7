"""A random checkpoint in each published layout goes the whole way: evaluated, trained with an adapter, merged, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints import WRITERS
from unmask import load
from unmask.cli import main
from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.run import train


@pytest.mark.parametrize("name", WRITERS)
def test_the_whole_way(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = WRITERS[name](tmp_path / "checkpoint")
    assert main(["info", model, "--max-new-tokens", "16"]) == 0
    assert "self-test" in capsys.readouterr().out
    assert main(["generate", "hello", "--model", model, "--decoder", "eoser-ass", "--max-new-tokens", "16"]) == 0

    def evaluated(model: str, output: str, *flags: str) -> list[dict[str, object]]:
        request = ["eval", "--model", model, "--task", "sudoku", "--decoder", "eoser-ass", "--limit", "3"]
        request += ["--max-new-tokens", "16", "--dtype", "float32", "--output", str(tmp_path / output), *flags]
        assert main(request) == 0
        lines = (tmp_path / output / "records" / "sudoku--eoser-ass.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    before = evaluated(model, "before")
    assert len(before) == 3

    config = DiffusionGRPOConfig(
        output_dir=str(tmp_path / "rl"),
        model=model,
        tasks=["sudoku"],
        objective="cj",
        decoder="eoser-ass",
        lora_r=2,
        problems=2,
        validation_problems=2,
        max_completion_length=16,
        per_device_train_batch_size=4,
        num_generations=4,
        max_steps=2,
        learning_rate=1e-2,
        beta=0.01,
        reward_funcs=["test_layouts:length"],
        bf16=False,
        eval_steps=2,
        save_steps=1,
        report_to=[],
    )
    final = str(train(config))
    base, tuned = (load(m, "float32").model.state_dict() for m in (model, final))
    changed = {k.split(".")[-2] for k in base if not torch.equal(base[k], tuned[k])}
    matrices = {"q_proj", "k_proj", "v_proj", "up_proj"}
    matrices |= {"attn_out", "ff_proj", "ff_out"} if name == "llada" else {"o_proj", "gate_proj", "down_proj"}
    assert changed == matrices and base.keys() == tuned.keys()
    outside = [k for k in base if k.endswith("transformer.ff_out.weight") or "embed" in k or "wte" in k]
    assert outside and all(torch.equal(base[k], tuned[k]) for k in outside)
    # A checkpoint's adapter, merged while loading, is what the run exported.
    adapter = str(tmp_path / "rl" / "checkpoint-2")
    tuned_records = evaluated(final, "final")
    assert [r["completion"] for r in tuned_records] != [r["completion"] for r in before]
    assert tuned_records == evaluated(adapter, "merged")
    assert evaluated(model, "beside", "--adapter", adapter) == tuned_records
    assert main(["export", adapter, str(tmp_path / "exported")]) == 0
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert exported["model_type"] == json.loads((tmp_path / "checkpoint" / "config.json").read_text())["model_type"]


def length(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """A reward that differs within a group."""
    return [float(len(set(text))) for text in completions]
