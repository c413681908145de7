"""The README.md of a trained checkpoint."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from unmask.config import default_of
from unmask.io.files import as_yaml
from unmask.models.masked_lm import MaskedLM

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
In transformers alone, `{parent}.from_pretrained` opens the weights, and peft takes what it opens. But that class sees tokens to
the left only, and this model was trained to see both sides{shift}."""


def model_card(lm: MaskedLM, config: Any, command: str, history: list[dict[str, float]]) -> str:
    """What a run trained, from what, how, how good it is by its last validation, and how to open it; Markdown for the hub.

    Args:
        config: the run's settings. command: ``sft`` or ``rl``. history: the Trainer's log lines.
    """
    tags = ["unmask", "masked-diffusion", command, *(["lora"] if config.lora_r is not None else [])]
    head = {"base_model": config.model, "library_name": "transformers", "tags": tags}
    model: Any = lm.model
    family = model.config.model_type
    parent = {"llama": "Llama", "qwen3": "Qwen3"}.get(family.removeprefix("a2d-"), "Qwen2")
    return _CARD.format(
        head=as_yaml({k: v for k, v in head.items() if v is not None}),
        name=Path(config.output).name,
        family=family,
        parameters=sum(p.numel() for p in model.parameters()),
        command=command,
        base="random weights" if config.model is None else f"`{config.model}`",
        scores=_scores(history),
        recipe=as_yaml({f.name: getattr(config, f.name) for f in fields(config) if _tells(config, f)}),
        elsewhere=_LLADA
        if family == "llada"
        else _PARENT.format(
            parent=f"{parent}ForCausalLM", shift=" and to predict a token from the one before it" * model.shifted
        ),
    )


def _tells(config: Any, field: Any) -> bool:
    """Whether a setting says how the model was made: one that is not at its default, where files go aside."""
    if field.name in ("output", "report_to", "log_every", "save_every"):
        return False
    return field.name in ("tasks", "steps") or getattr(config, field.name) != default_of(field)


def _scores(history: list[dict[str, float]]) -> str:
    """The last validation as a table."""
    last = next((line for line in reversed(history) if any(k.startswith("eval_") for k in line)), None)
    if last is None:
        return "No validation was made."
    rows = [f"| {k.removeprefix('eval_')} | {v:.4g} |" for k, v in last.items() if k.startswith("eval_")]
    return "\n".join([f"Validation after update {last['step']}:", "", "| | |", "|---|---:|", *rows])
