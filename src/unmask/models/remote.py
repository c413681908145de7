"""Checkpoints whose family is unknown here, run by their own Python files; only where the user asks for it by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from unmask.errors import UserError

_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")


class RemoteLM(nn.Module):
    """A model known only by its logits, each of its own position, behind the forward pass that the rest of the package calls.

    Its logits at all positions serve as hidden states; the head is the identity. For decoding and evaluation, without a cache.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.identity = nn.Identity()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)  # config, dtype, device, embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, positions: Any = None, fn: Any = None, **how: Any
    ) -> MaskedLMOutput:
        """See ``HeadAtPositions.forward``."""
        if how.get("cache") is not None:
            raise UserError("a checkpoint's own code has no cache of windows: leave cache out of the decoder")
        try:
            logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        except Exception as error:  # foreign code may raise anything
            raise UserError(f"the checkpoint's own code fails: {type(error).__name__}: {error}") from error
        if positions is not None:
            logits = logits.flatten(0, 1)[positions]
        return MaskedLMOutput(logits=logits if fn is None else fn(logits, self.identity, self.identity))


def load(folder: Path, config: dict[str, Any], settings: dict[str, Any]) -> RemoteLM:
    """The model by the checkpoint's own files. Raises UserError where they fail, whatever they raise."""
    kind = next((c for c in _CLASSES if c in config["auto_map"]), None)
    if kind is None:
        raise UserError(f"{folder} names none of {', '.join(_CLASSES)} in its auto_map: its code cannot be used")
    try:
        how = {**settings, "trust_remote_code": True, "local_files_only": True}
        inner = getattr(transformers, kind).from_pretrained(folder, **how)
    except Exception as error:  # foreign code may raise anything
        raise UserError(f"the own code of {folder} fails: {type(error).__name__}: {error}") from error
    return RemoteLM(inner)
