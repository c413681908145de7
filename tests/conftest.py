"""Toy models: small, random, float32, on the CPU. Larger initial weights than usual make their confidences differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.models.scratch import new_model

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 64}
SHAPE |= {"rope_theta": 10000.0, "max_sequence_length": 1024, "init_std": 0.5}
PROMPTS = ["make 5 from 1 2 2", "solve a1... b.4.. c..3. d...2", "x"]
PROMPTS += ["a longer prompt, so that the padding of the others is long as well"]

SEEDS = torch.tensor([11, 12, 13, 14])


def toy(task_defaults: Any = None, **shape: object) -> MaskedLM:
    model, tokenizer = new_model({**SHAPE, **shape}, seed=1)
    model.config.task_defaults = task_defaults or {}
    return MaskedLM.wrap(model.eval(), tokenizer, "toy")


@pytest.fixture(scope="session")
def toy_lm() -> MaskedLM:
    return toy()


@pytest.fixture(scope="session")
def tiny_lm() -> MaskedLM:
    return load("tiny")


def toy_that_ends(factor: float) -> MaskedLM:
    """A toy model that likes to end: EOS and EoT are among its candidates."""
    lm = toy()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[list(lm.end_ids)] *= factor
    return lm


@pytest.fixture(scope="session")
def ending_lm() -> MaskedLM:
    return toy_that_ends(3)


def logits_at(lm: MaskedLM, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Logits at ``positions`` (B, K) of each row, (B, K, V), from those of all positions; the mask token has -inf."""
    logits = lm.model(ids, mask).logits.detach()
    logits[..., lm.mask_id] = -torch.inf
    return logits[torch.arange(len(ids))[:, None], positions]


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
