"""From a name or a path to a MaskedLM."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from unmask.models.llada import LLaDAModelLM
from unmask.models.masked_lm import MaskedLM
from unmask.spec import UserError, unknown

SHIPPED = {"tiny": Path(__file__).parent / "tiny"}
FAMILIES = {"llada": LLaDAModelLM}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(name: str, dtype: str = "float32", device: str = "cpu") -> MaskedLM:
    """Load a shipped model by name or any LLaDA-format checkpoint folder, in eval mode, self-tested.

    Args:
        name: ``"tiny"``, or the path of a folder with config.json, safetensors and a tokenizer, or of a peft adapter, which
            is merged into the base model that it names.
        dtype: ``"float32"`` or ``"bfloat16"``. device: a torch device.

    Raises:
        UserError: one sentence, for an unknown name, an unsupported family, missing files or a failed self-test.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    folder = SHIPPED.get(name, Path(name))
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, dtype, device)
    if not (folder / "config.json").is_file():
        if folder.exists():
            raise UserError(f"{name} holds no config.json: give the folder of a saved checkpoint")
        raise UserError(f"unknown model {name!r}: give {', '.join(SHIPPED)} or the path of a checkpoint folder")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is not JSON ({error}): repair or fetch it again") from None
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise unknown("model family", str(family), FAMILIES)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{name} holds no .safetensors weights: convert the checkpoint to safetensors first")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{name} holds no tokenizer.json: save the tokenizer beside the weights")
    disable_progress_bar()
    try:
        loaded: Any = FAMILIES[family].from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, ArithmeticError, SafetensorError) as error:
        raise UserError(f"cannot load {name}: {_first_line(error)}") from None
    model, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            keys = sorted(str(k) for k in report[problem])
            raise UserError(
                f"{name} is refused: {problem.replace('_', ' ')} {', '.join(keys[:4])} ({len(keys)} in all)"
            )
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {_first_line(error)}") from None
    lm = MaskedLM.wrap(model, tokenizer, name, fingerprint(weights))
    lm.self_test()
    return lm


def as_masked_lm(model: MaskedLM | PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None = None) -> MaskedLM:
    """What trainers accept: a MaskedLM, a name or path, or a backbone with its tokenizer. Raises UserError."""
    if isinstance(model, MaskedLM):
        return model
    if isinstance(model, str):
        return load(model)
    if tokenizer is None:
        raise UserError("a PreTrainedModel needs its tokenizer: pass processing_class")
    return MaskedLM.wrap(model, tokenizer, model.config.name_or_path or "model")


def _load_adapter(folder: Path, dtype: str, device: str) -> MaskedLM:
    """The base model that an adapter names, with the adapter merged into its weights."""
    from peft import PeftModel

    try:
        base = dict(json.loads((folder / "adapter_config.json").read_text())).get("base_model_name_or_path")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'adapter_config.json'} is not JSON ({error}): repair or fetch it again") from None
    if not base:
        raise UserError(
            f"the adapter {folder} names no base model: set base_model_name_or_path in its adapter_config.json"
        )
    lm = load(base, dtype, device)
    try:
        merged = PeftModel.from_pretrained(lm.model, folder, local_files_only=True).merge_and_unload()
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load the adapter {folder}: {_first_line(error)}") from None
    lm = replace(lm, model=merged.eval(), name=str(folder), weights=fingerprint(sorted(folder.glob("*.safetensors"))))
    lm.self_test()
    return lm


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def fingerprint(files: list[Path], samples: int = 64, size: int = 1 << 16) -> str:
    """A short hash that changes with the weights: names, sizes and evenly spaced samples of the files (all of small ones)."""
    digest = hashlib.sha256()
    for file in files:
        total = file.stat().st_size
        digest.update(f"{file.name} {total} ".encode())
        with file.open("rb") as stream:
            for offset in range(0, total, max(size, total // samples)):
                stream.seek(offset)
                digest.update(stream.read(size if total > samples * size else total))
    return digest.hexdigest()[:16]
