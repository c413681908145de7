"""The README.md of a trained checkpoint."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from unmask.config import default_of
from unmask.io.files import as_yaml
from unmask.models.masked_lm import MaskedLM
from unmask.training.config import RunConfig

_NOT_RECIPE = ("output_dir", "report_to", "logging_steps", "save_steps")
_OPEN = """\
In transformers alone, `{}ForCausalLM.from_pretrained` opens the weights. But that class sees tokens to the left only, and this
model was trained to see both sides{}."""
_OPEN_LLADA = """\
In transformers, `import unmask` goes before `AutoModel.from_pretrained`. Without unmask, LLaDA takes the Python files that are
published with it (`GSAI-ML/LLaDA-8B-Instruct`): put them beside the weights, and their `auto_map` into config.json."""


def model_card(lm: MaskedLM, config: RunConfig, history: list[dict[str, float]]) -> str:
    """What a run trained, from what, how, how good it is by its last validation, and how to open it; Markdown for the hub.

    Args:
        history: the Trainer's log lines.
    """
    model: Any = lm.model
    family = model.config.model_type
    tags = ["unmask", "masked-diffusion", config.command, *(["lora"] if config.lora_r is not None else [])]
    head = {"library_name": "transformers", "tags": tags} | ({"base_model": config.model} if config.model else {})
    settings = {f.name: (getattr(config, f.name), f) for f in fields(config) if f.name not in _NOT_RECIPE}
    recipe = {k: v for k, (v, f) in settings.items() if k == "max_steps" or v != default_of(f)}
    scores = "No validation was made."
    if last := next((line for line in reversed(history) if any(k.startswith("eval_") for k in line)), {}):
        rows = [f"| {k.removeprefix('eval_')} | {v:.4g} |" for k, v in last.items() if k.startswith("eval_")]
        scores = "\n".join([f"Validation after update {last['step']}:", "", "| | |", "|---|---:|", *rows])
    parent = {"llama": "Llama", "qwen3": "Qwen3"}.get(family.removeprefix("a2d-"), "Qwen2")
    other = _OPEN.format(parent, " and to predict a token from the one before it" * model.shifted)
    return f"""\
---
{as_yaml(head)}---

# {Path(config.output_dir).name}

A masked diffusion language model ({family}, {sum(p.numel() for p in model.parameters()):,} parameters), trained by `unmask \
{config.command}` from {f"`{config.model}`" if config.model else "random weights"}.

## Scores

{scores}

## Recipe

```yaml
{as_yaml(recipe)}```

## Use

```python
import unmask

lm = unmask.load("PATH OF THIS FOLDER")
```

{_OPEN_LLADA if family == "llada" else other}
"""
