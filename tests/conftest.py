"""Toy models: small, random, float32, on the CPU. Larger initial weights than usual make their confidences differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.models.scratch import new_model

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 64}
SHAPE |= {"rope_theta": 10000.0, "max_sequence_length": 1024, "init_std": 0.5}
PROMPTS = ["make 5 from 1 2 2", "solve a1... b.4.. c..3. d...2", "x"]
PROMPTS += ["a longer prompt, so that the padding of the others is long as well"]


def toy(**shape: object) -> MaskedLM:
    model, tokenizer = new_model({**SHAPE, **shape}, seed=1)
    return MaskedLM.wrap(model.eval(), tokenizer, "toy")


@pytest.fixture(scope="session")
def toy_lm() -> MaskedLM:
    return toy()


@pytest.fixture(scope="session")
def tiny_lm() -> MaskedLM:
    return load("tiny")


def saved(lm: MaskedLM, folder: Path) -> str:
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory, toy_lm: MaskedLM) -> str:
    return saved(toy_lm, tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a toy checkpoint that says which form of the tasks it is for."""
    tasks = {"sudoku": {"style": "compact"}, "countdown": {"style": "compact", "max_value": 9}}
    return saved(toy(n_layers=1, task_defaults=tasks), tmp_path_factory.mktemp("model"))


@pytest.fixture
def no_global_randomness() -> object:
    """The code under test may neither draw from nor reseed torch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
