"""YAML files: numbers in scientific notation are numbers, at every depth of every file, and what is written is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unmask import make_decoder
from unmask.config import read_config
from unmask.io.files import as_yaml, read_yaml
from unmask.models.scratch import new_model
from unmask.rl.config import DiffusionGRPOConfig
from unmask.study.config import StudyConfig
from unmask.study.grid import read_grid
from unmask.training.config import SFTConfig

NUMBERS = ["1e-5", "1E-5", "+1e-5", "-2e3", "1.e-5", ".5e-3", "2.5e+3", "2.5e3", "3e0"]
TEXTS = ["1e", "e5", "1e5x", "1e-", "1e5-2", "12e3f"]


@pytest.mark.parametrize("nest", ["a: {}", "a: [{}, 1]", "a: {{b: {}}}", "a:\n  - b: [{}]", "a:\n  b:\n    c: {}"])
def test_scientific_notation_at_every_depth(nest: str, tmp_path: Path) -> None:
    def innermost(value: Any) -> Any:
        while isinstance(value, dict | list):
            value = next(iter(value.values())) if isinstance(value, dict) else value[0]
        return value

    for text in NUMBERS + TEXTS:
        (tmp_path / "f.yaml").write_text(nest.format(text))
        found = innermost(read_yaml(tmp_path / "f.yaml", "the file"))
        assert found == (float(text) if text in NUMBERS else text)
        if text in NUMBERS:
            assert isinstance(found, float)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    values = {"text": [*NUMBERS, *TEXTS, "1", "no", "~", "é"], "numbers": [1e-5, 1e300, 3.0, 2, None, True]}
    (tmp_path / "f.yaml").write_text(as_yaml(values), encoding="utf-8")
    assert read_yaml(tmp_path / "f.yaml", "the file") == values


def test_files_of_every_command(tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    shape = "{d_model: 16, n_layers: 1, n_heads: 2, mlp_hidden_size: 16, rms_norm_eps: 1e-5}"
    sft = read_config(
        SFTConfig, write("sft.yaml", f"output_dir: x\ntasks: [sudoku]\nmax_steps: 1e1\nnew_model: {shape}")
    )
    assert sft.new_model is not None and new_model(sft.new_model, 0)[0].config.rms_norm_eps == 1e-5
    assert sft.max_steps == 10
    write("base.yaml", "learning_rate: 1e-5")
    rl = read_config(
        DiffusionGRPOConfig, write("rl.yaml", "base: base.yaml\noutput_dir: x\ntasks: [sudoku]\nreward_weights: [1e-1]")
    )
    assert (rl.learning_rate, rl.reward_weights) == (1e-5, [0.1])
    decoder = make_decoder(str(write("d.yaml", "preset: eoser\ngamma_min: 1e-2")))
    assert decoder.gamma_min == 0.01
    tables = "evaluate: [{task: sudoku, decoder: eoser, gamma_min: [1e-2, 5e-2]}]"
    study = read_config(StudyConfig, write("study.yaml", f"output: x\n{tables}"))
    assert {cell.decoder.gamma_min for cell in read_grid(study, tmp_path).cells} == {0.01, 0.05}
