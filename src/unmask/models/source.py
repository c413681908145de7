"""Which model a command works on, as fields of its configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unmask.models.masked_lm import MaskedLM


@dataclass(kw_only=True)
class ModelSource:
    """Which model, and how it is loaded: what the commands that decode or inspect take."""

    model: str = "tiny"
    """A shipped model's name, a hub name (``GSAI-ML/LLaDA-8B-Instruct``), or the folder of a checkpoint or adapter."""
    adapter: str | None = None
    """Folder or hub name of a LoRA adapter to merge into the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: str = "auto"
    """``float32``, ``bfloat16`` or ``float16``; ``auto``: the checkpoint's own."""
    device: str = "auto"
    """``auto``: this process's GPU, or the CPU where there is none."""
    device_map: str | None = None
    """``auto`` or ``balanced`` spreads one model over several GPUs (and the CPU), instead of ``device``."""
    load_in_4bit: bool = False
    """Quantize the matrices of the blocks to 4 bits (NF4; needs bitsandbytes)."""
    trust_remote_code: bool = False
    """Run the Python files of a checkpoint whose family is unknown here, if the self-test passes. They can do anything."""

    def load(self) -> MaskedLM:
        """``unmask.models.load.load`` with these settings."""
        from unmask.models.load import load  # only here: command lines are read without torch

        settings = {f.name: getattr(self, f.name) for f in fields(ModelSource)}
        return load(settings.pop("model"), **settings)
