"""The README.md of a trained checkpoint."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from unmask.config import default_of
from unmask.io.files import as_yaml
from unmask.models.masked_lm import MaskedLM
from unmask.training.config import RunConfig

_CARD = """\
---
{head}---

# {name}

A masked diffusion language model ({family}, {parameters:,} parameters), trained by `unmask {command}` from {base}.

## Scores

{scores}

## Recipe

```yaml
{recipe}```

## Use

```python
import unmask

lm = unmask.load("PATH OF THIS FOLDER")
```

{elsewhere}
"""
_LLADA = """\
In transformers, `import unmask` goes before `AutoModel.from_pretrained`. Without unmask, LLaDA takes the Python files that are
published with it (`GSAI-ML/LLaDA-8B-Instruct`): put them beside the weights, and their `auto_map` into config.json."""
_PARENT = """\
In transformers alone, `{parent}ForCausalLM.from_pretrained` opens the weights. But that class sees tokens to the left only, and
this model was trained to see both sides{shift}."""


def model_card(lm: MaskedLM, config: RunConfig, history: list[dict[str, float]]) -> str:
    """What a run trained, from what, how, how good it is by its last validation, and how to open it; Markdown for the hub.

    Args:
        history: the Trainer's log lines.
    """
    tags = ["unmask", "masked-diffusion", config.command, *(["lora"] if config.lora_r is not None else [])]
    head = {"library_name": "transformers", "tags": tags} | ({"base_model": config.model} if config.model else {})
    model: Any = lm.model
    family = model.config.model_type
    parent = {"llama": "Llama", "qwen3": "Qwen3"}.get(family.removeprefix("a2d-"), "Qwen2")
    shift = " and to predict a token from the one before it" * model.shifted
    # Settings that say how the model was made: those that are not at their defaults.
    where = ("output_dir", "report_to", "logging_steps", "save_steps")
    recipe = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in where}
    defaults = {f.name: default_of(f) for f in fields(config) if f.name in recipe and f.name != "max_steps"}
    last = next((line for line in reversed(history) if any(k.startswith("eval_") for k in line)), {})
    rows = [f"| {k.removeprefix('eval_')} | {v:.4g} |" for k, v in last.items() if k.startswith("eval_")]
    scores = [f"Validation after update {last['step']}:", "", "| | |", "|---|---:|", *rows] if last else []
    return _CARD.format(
        head=as_yaml(head),
        name=Path(config.output_dir).name,
        family=family,
        parameters=sum(p.numel() for p in model.parameters()),
        command=config.command,
        base="random weights" if config.model is None else f"`{config.model}`",
        scores="\n".join(scores) or "No validation was made.",
        recipe=as_yaml({k: v for k, v in recipe.items() if k not in defaults or v != defaults[k]}),
        elsewhere=_LLADA if family == "llada" else _PARENT.format(parent=parent, shift=shift),
    )
