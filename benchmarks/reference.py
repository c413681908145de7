"""The released EOSER-ASS-RL code as a reference: its ``eval/generate.py``, imported from a checkout at run time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from unmask.decoding import Decoder
from unmask.errors import UserError
from unmask.models.head import MASKED_LOGIT
from unmask.models.masked_lm import MaskedLM


def load_reference(folder: str) -> ModuleType:
    """The module ``eval/generate.py`` of a checkout. Raises UserError where it is not there or cannot be imported."""
    path = Path(folder) / "eval" / "generate.py"
    if not path.is_file():
        raise UserError(f"{folder} holds no eval/generate.py: use a checkout of EOSER-ASS-RL")
    specification = importlib.util.spec_from_file_location("released_generate", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001  (somebody else's module may raise anything)
        raise UserError(f"cannot import {path}: {error!r}") from None
    return module


def counterpart(decoder: Decoder) -> tuple[str, dict[str, Any]] | None:
    """The released function that does what a decoder does, with its arguments; None where there is none.

    (Its EOSER restarts its clock in every block, and it has no hard suppression, threshold or hybrid.)
    """
    rejects, ascending = decoder.eos == "reject", decoder.schedule == "ascending"
    if (
        decoder.confidence not in ("low-confidence", "random")
        or decoder.eos in ("suppress", "exclude")
        or decoder.eos_tokens != "eos"
        or decoder.threshold is not None
        or decoder.cache not in ("auto", "none")
        or (decoder.block_length is not None and (ascending or rejects))
    ):
        return None
    arguments: dict[str, Any] = {
        "steps": decoder.plan.steps,
        "gen_length": decoder.plan.length,
        "temperature": decoder.temperature,
        "cfg_scale": decoder.cfg_scale,
        "remasking": "random" if decoder.confidence == "random" else "low_confidence",
    }
    if rejects:
        arguments["eos_min_gamma"] = decoder.gamma_min
    if ascending:
        return "eoser_ass_generate" if rejects else "ass_generate", {**arguments, "block_num": decoder.blocks}
    arguments["block_length"] = decoder.block_length or decoder.plan.length
    return "eoser_generate" if rejects else "generate", arguments


def reference_decode(module: ModuleType, lm: MaskedLM, prompt: Tensor, decoder: Decoder) -> Callable[[], Tensor] | None:
    """A call that decodes prompts (B, P) without padding and returns the canvases (B, L); None without a counterpart.

    The released code asks for CUDA's autocast and for its rank in a process group: it gets neither.
    """
    found = counterpart(decoder)
    if found is None:
        return None
    name, arguments = found

    def model(ids: Tensor) -> SimpleNamespace:
        logits = lm.model(input_ids=ids).logits
        logits[..., lm.mask_id] = MASKED_LOGIT  # as in ours, or the two could not be compared
        return SimpleNamespace(logits=logits)

    model.dtype = lm.model.dtype  # type: ignore[attr-defined]
    tokenizer = SimpleNamespace(eos_token_id=lm.eos_id)

    def run() -> Tensor:
        with (
            patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
            patch.object(torch.distributed, "get_rank", lambda: 1),  # any but 0 keeps its progress bar silent
        ):
            out: Tensor = getattr(module, name)(model, prompt, tokenizer, mask_id=lm.mask_id, **arguments)
        return out[:, prompt.shape[1] :]

    return run
