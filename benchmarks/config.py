"""Settings of the benchmarks: read without torch, so that help and a typo answer at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from unmask.errors import UserError, check_at_least, check_positive

STAND_IN = "stand-in"
WORKS = ("decode", "lora", "lora checkpointing", "all", "all checkpointing")


@dataclass
class Shape:
    """A stand-in with LLaDA's vocabulary and random weights."""

    vocabulary: int = 126_464
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    mlp_hidden_size: int = 768
    block_length: int | None = None
    """Make the stand-in's attention block-causal, in blocks of so many tokens."""
    prompt: int = 64
    """Prompt length in tokens; models other than a stand-in get Countdown prompts of one length instead."""
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "d_model", "n_layers", "n_heads", "mlp_hidden_size", "prompt")
        check_at_least(self, 128, "vocabulary")
        if self.block_length is not None:
            check_at_least(self, 1, "block_length")
        if self.d_model % (2 * self.n_heads):
            raise UserError(
                f"d_model={self.d_model} is no multiple of 2 * n_heads={2 * self.n_heads}: change one of them"
            )
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise UserError("device is cuda, but there is no GPU here: use --device cpu")


@dataclass
class BenchDecode(Shape):
    """Time and memory of decoding, without early stop.

    *step*: one pass of our loop with its commits. *needed*: the same forward pass with logits at the open masked positions and
    nothing else. *trunk*: the same without logits. They alternate on recorded states, ``passes`` of them evenly spaced over
    the plan; tokens a second are those of the whole plan at that speed (of whole decodes for a decoder with a cache).
    """

    model: tuple[str, ...] = (STAND_IN, "tiny")
    """``stand-in`` (random weights of the shape below), a shipped model's name or the path of a checkpoint folder."""
    decoder: tuple[str, ...] = ()
    """Decoder specs; by default every preset."""
    temperature: tuple[float, ...] = (0.0, 1.0)
    length: tuple[int, ...] = (128,)
    """Canvas lengths in tokens."""
    rows: int = 4
    passes: int = 8
    """States of each trajectory that are timed."""
    repeats: int = 5
    reference: str | None = None
    """A checkout of EOSER-ASS-RL, whose eval/generate.py decodes the same prompts: time and greedy tokens are compared."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    output: str = "runs/bench-decode.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "rows", "passes", "repeats")
        from benchmarks.reference import load_reference
        from unmask.decoding import PRESETS, make_decoder

        sampling = any(self.temperature)  # leaves out what is for greedy decoding alone
        self.decoder = self.decoder or tuple(
            name for name, fields in PRESETS.items() if not (sampling and "credit" in fields)
        )
        if not (self.model and self.temperature and self.length):
            raise UserError("model, temperature and length each need at least one value")
        for spec, temperature, length in product(self.decoder, self.temperature, self.length):
            make_decoder(spec, max_new_tokens=length, temperature=temperature)
        if self.reference is not None:
            load_reference(self.reference)


@dataclass
class BenchRL(Shape):
    """Time and peak memory of one ``cj`` update over S steps, beside the plain way and the other objectives.

    The model is a stand-in: LLaDA's vocabulary, random weights. *plain*: S forwards with logits of the whole sequence, all
    graphs alive until one backward, and S more without gradient for the old log-probabilities. *bare*: forward and backward of
    the same rows, the head at the scored positions, a plain sum as loss.
    """

    steps: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of decoding steps S."""
    way: tuple[str, ...] = ()
    """Only these: ``cj``, ``bare``, ``plain``, ``one-step``, ``diffu``; in blocks ``cj`` and ``sequential``. By default all."""
    rows: int = 2
    """Completions in the update."""
    rows_per_forward: int = 8
    """Rows of one forward pass, of whatever views."""
    length: int = 128
    """Canvas length in tokens."""
    lora: int = 0
    """Rank of an adapter; 0 trains all weights."""
    bf16: bool = False
    """Weights in bfloat16 (an adapter's stay float32) and autocast to it."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile the model without its head."""
    repeats: int = 3
    memory_limit: float = 0.6
    """Cells that would need more than this share of the free memory (the plain way at many steps) are not run."""
    output: str = "runs/bench-rl.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "rows", "rows_per_forward", "length", "repeats")
        check_at_least(self, 0, "lora")
        if not self.steps or not all(1 <= s <= self.length for s in self.steps):
            raise UserError(f"steps {self.steps} do not fit a canvas of {self.length}: choose 1 to {self.length}")

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bf16 else "float32"


@dataclass
class BenchMemory(Shape):
    """Formula and measured peak of decoding, and of an update with a LoRA adapter or of all weights (AdamW included).

    The model is a stand-in of the asked shape. Where all weights are trained they are float32, else ``dtype``; autocast is to
    bfloat16.
    """

    vocabulary: int = 32_768
    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    mlp_hidden_size: int = 1536
    work: tuple[str, ...] = WORKS
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    length: tuple[int, ...] = (64, 256)
    """Canvas lengths L."""
    completions: tuple[int, ...] = (2, 8)
    """Completions of the update, or rows in decoding (G)."""
    steps: int = 8
    """Steps that the update scores (S)."""
    rows_per_forward: int = 8
    lora: int = 16
    output: str = "runs/bench-memory.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "steps", "rows_per_forward", "lora")
        if not set(self.work) <= set(WORKS):
            raise UserError(f"work is {self.work}: choose some of {', '.join(WORKS)}")
        if min(self.length, default=0) < self.steps or min(self.completions, default=0) < 1:
            sizes = f"length={self.length}, completions={self.completions}, steps={self.steps}"
            raise UserError(f"{sizes}: choose 1 or more, and no more steps than tokens")


@dataclass
class BenchShapes(Shape):
    """Predicted for a GPU from tensors without data: kernels, bytes moved, live memory of a forward pass at LLaDA-8B's size."""

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    mlp_hidden_size: int = 12288
    prompt: int = 200
    decoder: tuple[str, ...] = ("full", "eoser-ass", "full:cfg_scale=1")
    rows: int = 6
    length: int = 256
    """Canvas length in tokens."""
    steps: int = 8
    """Of the trajectory that an update scores: a pass scores ``length / steps`` tokens a row."""
    lora: int = 128
    output: str = "runs/bench-shapes.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "rows", "length", "steps", "lora")


@dataclass
class BenchGPU:
    """Every measurement that docs/performance.md lacks for want of a GPU, in one go: its tables, and what failed."""

    minutes: float = 25.0
    """For all of them together."""
    reference: str | None = None
    """A checkout of EOSER-ASS-RL, as for ``decode``."""
    dry_run: bool = False
    """Try every line on the CPU, at a small size."""
    output: str = "runs/gpu"
    """Folder of the page and of each line's result."""

    def __post_init__(self) -> None:
        check_positive(self, "minutes")


@dataclass
class BenchGap:
    """Log-prob mismatch of every objective under several decoders: mean |recorded - recomputed|, nats a token."""

    model: str = "tiny"
    task: list[str] = field(default_factory=lambda: ["sudoku", "countdown"])
    decoder: list[str] = field(default_factory=lambda: ["full", "semi-ar", "eoser", "eoser-ass"])
    limit: int = 64
    """Training problems a task, one completion each."""
    temperature: float = 1.0
    max_new_tokens: int = 128
    rows_per_forward: int = 32
    seed: int = 0
    objective: list[str] = field(default_factory=lambda: ["cj", "one-step", "diffu", "coupled"])
    output: str = "runs/bench-gap.json"

    def __post_init__(self) -> None:
        if self.limit < 1 or self.rows_per_forward < 1 or not (self.task and self.decoder and self.objective):
            raise UserError("limit, rows_per_forward, task, decoder and objective each need at least one")


@dataclass
class BenchServe:
    """``unmask serve`` under load, beside ``decode_each`` on the same prompts with the same rows a pass.

    Clients of OpenAI's library send a request each, again and again; offline decoding follows each round, while the server
    waits. At the end come more requests at once than the queue takes.
    """

    model: str = "tiny"
    task: str = "countdown"
    decoder: str = "eoser-ass"
    max_batch: int = 32
    max_queue: int = 256
    clients: int = 64
    seconds: float = 60.0
    """Of load, all rounds together, and of offline decoding."""
    rounds: int = 3
    output: str = "runs/bench-serve.json"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_batch", "max_queue", "clients", "rounds")
        check_at_least(self, 1, "seconds")
