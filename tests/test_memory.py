"""The memory formula: what it counts, and how near it is to what a process really takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common import stand_in
from benchmarks.config import BenchMemory
from benchmarks.memory import estimate
from benchmarks.memory import run as measure_peaks
from checkpoints import WRITERS
from unmask.cli import main
from unmask.models.load import load, load_meta
from unmask.models.memory import Workload, decoding_memory, training_memory

ROWS = Workload(torch.float32, rows=2, prompt=10, length=22)


@pytest.mark.parametrize("name", WRITERS)
def test_weights_and_states_are_counted(name: str, tmp_path: Path) -> None:
    lm = load(WRITERS[name](tmp_path), "float32")
    size = 4 * sum(p.numel() for p in lm.model.parameters())
    need = training_memory(lm, ROWS)
    assert (need.weights, need.gradients, need.optimizer, need.reference) == (size, size, 2 * size, 0)
    assert training_memory(lm, Workload(**{**vars(ROWS), "reference": True})).reference == size
    more = Workload(**{**vars(ROWS), "completions": 6, "steps": 7})
    assert training_memory(lm, more).views == 6 * 7 * (8 * 32 + 22)
    assert training_memory(lm, more).total - training_memory(lm, more).views == need.total - need.views  # no S, no G
    assert decoding_memory(lm, ROWS).weights == size == decoding_memory(load_meta(str(tmp_path)), ROWS).weights


def test_measured_peaks(tmp_path: Path) -> None:
    """One peak measured here, and those that were measured for the documents."""
    shape = {"vocabulary": 8192, "d_model": 384, "n_heads": 6, "n_layers": 4, "mlp_hidden_size": 1152}
    cells = {"work": ("lora",), "length": (64,), "completions": (4,), "steps": 2, "prompt": 32}
    # In float32: many processors have no instructions for bfloat16.
    config = BenchMemory(**shape, **cells, dtype="float32", output=str(tmp_path / "memory.json"))
    for cell in measure_peaks(config, lambda _: None)["cells"]:
        assert cell["formula"] == pytest.approx(cell["measured"], rel=0.15), cell
    known = json.loads((Path(__file__).parents[1] / "docs/results/bench-memory.json").read_text())
    config = BenchMemory(**known["config"])
    lm = stand_in(config, "float32", "cpu")
    for cell in known["cells"]:
        found = estimate(config, lm, cell["work"], cell["length"], cell["completions"]).total
        assert found == cell["formula"] == pytest.approx(cell["measured"], rel=0.1), cell


def test_info_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = WRITERS["dream"](tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert main(["info", folder, "--no-weights", "--max-new-tokens", "16"]) == 0
    out = capsys.readouterr().out
    assert "shifted here" in out and "323 <|mask|>" in out
    assert main(["info", folder]) == 2
    assert "no .safetensors" in capsys.readouterr().err
    assert main(["info", folder, "--no-weights", "--dtype", "int3"]) == 2
    assert "unknown dtype" in capsys.readouterr().err
