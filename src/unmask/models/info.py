"""``unmask info``: what a checkpoint is, whether it passes its self-test, and how much memory working with it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from unmask.config import read_flags
from unmask.errors import UserError, check_at_least
from unmask.io.terminal import console
from unmask.models.source import ModelSource

if TYPE_CHECKING:
    from unmask.models.masked_lm import MaskedLM
    from unmask.models.memory import MemoryEstimate

# Heavy imports are inside the functions, so that --help and a typo answer at once.


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
    lora_r: int = 128

    def __post_init__(self) -> None:
        check_at_least(self, 1, "prompt", "batch_size", "rows_per_forward", "lora_r")
        if not self.max_new_tokens or min(self.max_new_tokens) < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: choose lengths of 1 or more")
        if self.trust_remote_code or self.load_in_4bit:
            hidden = "foreign code and quantized weights do not show a checkpoint's shape"
            raise UserError(f"{hidden}, which info reads: leave them out")
        if not self.weights and self.adapter is not None:
            raise UserError(f"--no-weights reads no adapter: leave --adapter {self.adapter} out")


def facts(lm: MaskedLM) -> dict[str, str]:
    """What a checkpoint is, in the order of reading."""
    config: Any = lm.model.config
    tokens = {name: getattr(lm, f"{name}_id") for name in ("mask", "eos", "eot", "pad")}
    shifted, moe = getattr(lm.model, "shifted", False), hasattr(config, "num_experts_per_tok")
    return {
        "family": f"{config.model_type} ({type(lm.model).__name__})",
        "parameters": f"{sum(p.numel() for p in lm.model.parameters()):,}",
        "layers × width": f"{config.num_hidden_layers} × {config.hidden_size}, feed-forward {config.intermediate_size}"
        + (
            f", {config.num_experts_per_tok} of {config.num_local_experts} experts of {config.moe_intermediate_size}"
            if moe
            else ""
        ),
        "heads": f"{config.num_attention_heads} ({config.num_key_value_heads or config.num_attention_heads} of keys)",
        "vocabulary": f"{config.vocab_size:,}",
        "longest row": f"{lm.max_length:,} tokens",
        "attention": "full" if lm.block_length is None else f"block-causal, blocks of {lm.block_length} tokens",
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        **{k: "none" if i is None else f"{i} {lm.tokenizer.convert_ids_to_tokens(i)}" for k, i in tokens.items()},
        "chat template": "yes" if lm.tokenizer.chat_template else "no",
        "logits": "of the next position, shifted here" if shifted else "of their own position",
        **({"trained for": str(lm.task_defaults)} if lm.task_defaults else {}),
    }


def memory(lm: MaskedLM, a: InfoArguments) -> list[tuple[str, int, MemoryEstimate]]:
    """(what, L, bytes) for decoding, for training an adapter and for training all weights, with and without checkpointing."""
    import torch

    from unmask.models.memory import Workload, decoding_memory, training_memory

    cuda, dtype = not a.weights or lm.device.type != "cpu", lm.model.dtype
    rows = []
    for length in a.max_new_tokens:
        work = Workload(dtype, a.batch_size, a.prompt, length, cuda=cuda, reference=True)
        rows.append((f"decode, {a.batch_size} rows", length, decoding_memory(lm, work)))
        for label, kind, lora in ((f"LoRA r={a.lora_r}", dtype, a.lora_r), ("all weights", torch.float32, 0)):
            for suffix, again in (("", False), (", checkpointing", True)):
                one = replace(work, rows=a.rows_per_forward, dtype=kind, lora=lora, checkpointing=again)
                rows.append((f"rl {label}{suffix}", length, training_memory(lm, one)))
    return rows


def command(arguments: list[str]) -> None:
    """``unmask info``. Raises UserError as ``load`` does."""
    a = read_flags(InfoArguments, arguments, prog="unmask info")
    from rich.table import Column, Table

    from unmask.models.load import load_meta
    from unmask.models.memory import GIB

    lm = a.load() if a.weights else load_meta(a.model, a.dtype, a.revision)
    screen = console()
    table = Table(box=None, show_header=False, title=lm.name, title_justify="left")
    for name, value in facts(lm).items():
        table.add_row(name, value)
    if a.weights:
        found = ", ".join(f"{k} {v:.2g}" for k, v in lm.self_test().items())
        table.add_row("self-test", f"passed: {found} (std of the logits)")
    screen.print(table)
    rl = f"rl: {a.rows_per_forward} rows a forward pass, bf16 autocast, beta > 0"
    screen.print(f"\nmemory in GiB, on one process without sharding: P = {a.prompt}; {rl}")
    estimates = memory(lm, a)
    parts = [k for k in asdict(estimates[0][2]) if k != "views"]  # token ids, too few to show
    table = Table("", *(Column(name, justify="right") for name in ("L", "total", *parts)), box=None)
    for what, length, estimate in estimates:
        cells = [f"{getattr(estimate, k) / GIB:.2f}" if getattr(estimate, k) else "" for k in parts]
        table.add_row(what, str(length), f"{estimate.total / GIB:.2f}", *cells)
    screen.print(table)
