"""From a name or a path to a MaskedLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

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
        family = json.loads((folder / "config.json").read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON ({error}): repair or fetch it again") from None
    if family not in FAMILIES:
        raise unknown("model family", str(family), FAMILIES)
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{name} holds no .safetensors weights: convert the checkpoint to safetensors first")
    try:
        loaded: Any = FAMILIES[family].from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, local_files_only=True
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load {name}: {str(error).strip().splitlines()[0]}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            keys = sorted(str(k) for k in report[problem])
            raise UserError(
                f"{name} is refused: {problem.replace('_', ' ')} {', '.join(keys[:4])} ({len(keys)} in all)"
            )
    lm = MaskedLM.wrap(model.to(device).eval(), tokenizer, name)
    lm.self_test()
    return lm
