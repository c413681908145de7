"""``unmask info``: what a checkpoint is, whether it passes its self-test, and how much memory working with it takes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from unmask.errors import UserError, check_at_least
from unmask.io.terminal import console
from unmask.models.source import ModelSource

if TYPE_CHECKING:
    from unmask.models.masked_lm import MaskedLM
    from unmask.models.memory import MemoryEstimate

# Heavy imports stand inside the functions, so that --help and a typo answer at once.

DECODING = (
    "alg",
    "alg_temp",
    "eps",
    "max_new_tokens",
    "steps",
    "temperature",
    "top_k",
    "top_p",
)  # of generation_config.json


@dataclass(kw_only=True)
class InfoArguments(ModelSource):
    """Family, sizes, ids, self-test and memory of a checkpoint."""

    model: Annotated[str, tyro.conf.Positional] = "tiny"
    """A shipped model's name, a hub name, or the folder of a checkpoint or adapter."""
    weights: bool = True
    """``--no-weights`` reads (and fetches) the configuration and tokenizer alone: no self-test, memory as for a GPU."""
    prompt: int = 200
    """Prompt length P in tokens, for the memory figures."""
    max_new_tokens: tuple[int, ...] = (128, 256)
    """Canvas lengths L."""
    batch_size: int = 8
    """Rows of a forward pass in decoding."""
    rows_per_forward: int = 6
    """Rows of a forward pass in training."""
    num_generations: int = 6
    """Completions a prompt, G."""
    groups: int = 2
    """Prompts of an update on one process."""
    steps: int | None = None
    """Decoding steps S that ``cj`` scores; by default L/2."""
    lora_r: int = 128

    def __post_init__(self) -> None:
        check_at_least(self, 1, "prompt", "batch_size", "rows_per_forward", "num_generations", "groups", "lora_r")
        if not self.max_new_tokens or min(self.max_new_tokens) < 1 or (self.steps or 1) < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}, steps={self.steps}: give 1 or more")


def facts(lm: MaskedLM) -> dict[str, Any]:
    """What a checkpoint is, in the order of reading."""
    config: Any = lm.model.config
    tokens = {name: getattr(lm, f"{name}_id") for name in ("mask", "eos", "eot", "pad")}
    spelled = {k: "none" if i is None else f"{i} {lm.tokenizer.convert_ids_to_tokens(i)}" for k, i in tokens.items()}
    heads = f"{config.num_attention_heads} ({config.num_key_value_heads or config.num_attention_heads} of keys)"
    return {
        "family": f"{config.model_type} ({type(lm.model).__name__})",
        "parameters": f"{sum(p.numel() for p in lm.model.parameters()):,}",
        "layers × width": f"{config.num_hidden_layers} × {config.hidden_size}, feed-forward {config.intermediate_size}",
        "heads": heads,
        "vocabulary": f"{config.vocab_size:,}",
        "longest row": f"{lm.max_length:,} tokens",
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        **spelled,
        "chat template": "yes" if lm.tokenizer.chat_template else "no",
        "logits": "of the next position, shifted here"
        if getattr(lm.model, "shifted", False)
        else "of their own position",
        **({"trained for": str(lm.task_defaults)} if lm.task_defaults else {}),
    }


def memory(lm: MaskedLM, a: InfoArguments) -> list[tuple[str, int, MemoryEstimate]]:
    """(what, L, bytes) for decoding, for training an adapter and for training all weights, with and without checkpointing."""
    import torch

    from unmask.models.memory import Workload, decoding_need, training_need

    cuda = not a.weights or lm.device.type != "cpu"
    own = lm.model.dtype
    rows = []
    for length in a.max_new_tokens:
        load = Workload(own, a.batch_size, a.prompt, length, cuda=cuda)
        rows.append((f"decode, {a.batch_size} rows", length, decoding_need(lm, load)))
        shared: dict[str, Any] = {
            "rows": a.rows_per_forward,
            "prompt": a.prompt,
            "length": length,
            "completions": a.groups * a.num_generations,
            "steps": a.steps or max(1, length // 2),
            "reference": True,
            "cuda": cuda,
        }
        for label, extra in (
            (f"LoRA r={a.lora_r}", {"dtype": own, "lora": a.lora_r}),
            ("all weights", {"dtype": torch.float32}),
        ):
            for suffix, checkpointing in (("", False), (", checkpointing", True)):
                need = training_need(lm, Workload(**shared, **extra, checkpointing=checkpointing))
                rows.append((f"rl {label}{suffix}", length, need))
    return rows


def info(a: InfoArguments) -> None:
    """Print it. Raises UserError as ``load`` does."""
    from rich.table import Table

    from unmask.models.load import find_folder, load_meta, read_json
    from unmask.models.memory import GIB, MemoryEstimate

    if a.trust_remote_code or a.load_in_4bit:
        raise UserError(
            "info reads a checkpoint's shape, which foreign code and quantised weights do not show: leave them out"
        )
    if not a.weights and a.adapter is not None:
        raise UserError(f"--no-weights reads no adapter: leave --adapter {a.adapter} out")
    lm = a.load() if a.weights else load_meta(a.model, a.dtype, a.revision)
    screen = console()
    table = Table(box=None, show_header=False, title=lm.name, title_justify="left")
    for name, value in facts(lm).items():
        table.add_row(name, value)
    defaults = find_folder(a.model, a.revision, weights=False) / "generation_config.json"
    if defaults.is_file():
        own = read_json(defaults)
        table.add_row("own defaults", json.dumps({k: v for k, v in own.items() if k in DECODING and v is not None}))
    if a.weights:
        found = lm.self_test()
        table.add_row(
            "self-test", "passed: " + ", ".join(f"{k} {v:.2g}" for k, v in found.items()) + " (std of the logits)"
        )
    screen.print(table)
    screen.print(
        f"\nmemory in GiB, on one process without sharding: P = {a.prompt}; rl: {a.rows_per_forward} rows a forward pass, "
        f"G = {a.num_generations}, {a.groups} groups, bf16 autocast, beta > 0"
    )
    table = Table(box=None)
    table.add_column("")
    parts = list(asdict(MemoryEstimate(0, 0, 0)))
    for name in ("L", "total", *parts):
        table.add_column(name, justify="right")
    for what, length, need in memory(lm, a):
        cells = [f"{asdict(need)[k] / GIB:.2f}" if asdict(need)[k] else "" for k in parts]
        table.add_row(what, str(length), f"{need.total / GIB:.2f}", *cells)
    screen.print(table)
