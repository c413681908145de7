"""Low-rank adapters (LoRA, arXiv 2106.09685) for training: which matrices, the first weights, the base model's name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask.config import LORA_TARGETS
from unmask.errors import UserError
from unmask.models.load import SHIPPED
from unmask.models.masked_lm import MaskedLM


def adapter_config(r: int, alpha: int, targets: str = LORA_TARGETS, dropout: float = 0.0) -> Any:
    """A peft LoraConfig. ``targets`` is a regular expression over whole module names."""
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout)


def check_precision(lm: MaskedLM, lora_r: int | None) -> None:
    """Raises UserError where all weights would be trained in less than float32: most updates would round to nothing."""
    if lora_r is None and lm.model.dtype != torch.float32:
        dtype = str(lm.model.dtype).removeprefix("torch.")
        trained = f"all weights of {lm.name} would be trained in {dtype}, where small updates are lost"
        raise UserError(f"{trained}: set dtype to float32 (bf16 is autocast), or lora_r")


@contextmanager
def adapter_errors() -> Iterator[None]:
    """Turns what peft raises where no module is meant, or the targets are no regular expression, into a UserError."""
    try:
        yield
    except (ValueError, re.error) as error:
        raise UserError(f"the adapter does not fit the model: {str(error).splitlines()[0]}") from None


def adapter_size(model: nn.Module, r: int, targets: str) -> int:
    """Parameters of an adapter of rank ``r`` on the matrices whose names ``targets`` matches. Raises UserError."""
    with adapter_errors():
        found: list[Any] = [m for name, m in model.named_modules() if re.fullmatch(targets, name)]
        shapes = [m.weight.shape for m in found if isinstance(m, nn.Linear | nn.Embedding)]
        experts = [p.shape for p in experts_of(model, targets).values()]
        if not shapes and not experts:
            raise ValueError(f"no matrix has a name that matches {targets}")
    return r * (sum(map(sum, shapes)) + sum(count * (rows + columns) for count, rows, columns in experts))


def experts_of(model: nn.Module, targets: str) -> dict[str, Any]:
    """The stacked matrices of experts whose names ``targets`` matches; they are parameters, not modules."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 3 and re.fullmatch(targets, name)}


def add_adapter(lm: MaskedLM, config: Any, seed: int) -> MaskedLM:
    """``lm`` with a new adapter of a peft config, its first weights drawn from ``seed``; only the adapter is trained.

    The adapter names its base model by a whole path, so that a saved one can be loaded alone. Raises UserError if no module
    of the model is meant, or the targets are no regular expression.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), adapter_errors(), warnings.catch_warnings():
        if isinstance(config.target_modules, str):
            config.target_parameters = [*experts_of(lm.model, config.target_modules)] or config.target_parameters
        warnings.simplefilter("ignore")  # of tied weights, which merging unties
        torch.default_generator.manual_seed(seed)  # that of the CPU, which the fork restores
        model: Any = get_peft_model(lm.model, config)
    base = Path(lm.name)
    whole = base.exists() and lm.name not in SHIPPED
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = str(base.resolve()) if whole else lm.name
    return replace(lm, model=model)
