"""From a name or a path to a MaskedLM."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
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
        name: ``"tiny"``, or the path of a folder with config.json, safetensors and a tokenizer.
        dtype: ``"float32"`` or ``"bfloat16"``. device: a torch device.

    Raises:
        UserError: one sentence, for an unknown name, an unsupported family, missing files or a failed self-test.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    folder = SHIPPED.get(name, Path(name))
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
