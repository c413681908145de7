"""How much memory decoding and training need, before anything is loaded.

    decoding = weights + activations + head
    training = weights + gradients + optimiser + reference + activations + head + views

weights: parameters × bytes (an adapter's are float32). gradients, optimiser: trained parameters × bytes, once (and once
more in DDP's buckets, with several processes) and twice (AdamW). reference: a second copy of the weights, where all of them are
trained and ``beta`` > 0. activations: a + b × layers for ``rows_per_forward`` rows; a and b are read off by tracing the model's
own layers, two and three of them, forward and backward, on tensors without data. head: three float32 pieces of the logits,
and the gradient of the whole head where it is trained. views: the token ids of every step of every completion: the only term
in which the number of steps S and the group size G appear.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from unmask.models.adapters import LORA_TARGETS, adapter_config, adapter_errors
from unmask.models.head import CPU_CHUNK, GPU_CHUNK
from unmask.models.load import meta_model
from unmask.models.masked_lm import MaskedLM

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose; the peak is their sum."""

    weights: float
    activations: float
    head: float
    gradients: float = 0.0
    optimiser: float = 0.0
    reference: float = 0.0
    views: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Workload:
    """What is asked of the model.

    Attributes:
        dtype: of the weights. rows: of one forward pass. prompt, length: tokens of a row, P and L.
        lora: rank of the adapter that is trained, 0 for all weights. targets: its modules, a regular expression.
        autocast: to bfloat16. checkpointing: of activations, a block at a time. reference: whether beta > 0.
        completions, steps: in one update, on one process. processes: of the run. cuda: whether pieces are those of a GPU.
    """

    dtype: torch.dtype
    rows: int
    prompt: int
    length: int
    lora: int = 0
    targets: str = LORA_TARGETS
    autocast: bool = True
    checkpointing: bool = False
    reference: bool = False
    completions: int = 1
    steps: int = 1
    processes: int = 1
    cuda: bool = False


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made and not yet freed."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: Any = weakref.WeakSet(t.untyped_storage() for t in known)
        self.known = [t.untyped_storage() for t in known]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def _outlined(kind: type[PreTrainedModel], config: Any, load: Workload, train: bool) -> Any:
    """The model without data, with its adapter if one is trained."""
    model = meta_model(kind, config, load.dtype)
    if not (train and load.lora):
        return model
    from peft import get_peft_model

    with torch.device("meta"), warnings.catch_warnings(), adapter_errors():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        return get_peft_model(model, adapter_config(load.lora, load.lora, load.targets))


def _peak(kind: type[PreTrainedModel], config: Any, load: Workload, layers: int, train: bool) -> int:
    """Bytes alive at the peak of one pass through ``layers`` layers, beside weights and gradients."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = layers, 64
    if getattr(config, "embedding_size", None):
        config.embedding_size = 64
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, special, None)
    model = _outlined(kind, config, load, train)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, old in store.items():
                    if old is not None:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        store[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        parameters = list(model.parameters())
        if train:
            for p in parameters:
                p.grad = torch.empty_like(p) if p.requires_grad else None
        model.train(train)
        if load.checkpointing and train:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(load.rows, load.prompt + load.length, dtype=torch.int64)
        mask = torch.ones_like(ids, dtype=torch.bool)
        grads = [p.grad for p in parameters if p.grad is not None]
        live = _Live(ids, mask, *parameters, *grads, *model.buffers())
        trunk = model.get_base_model().model if load.lora and train else model.model
        autocast = torch.autocast("cpu", torch.bfloat16) if load.autocast and train else nullcontext()
        with live, torch.set_grad_enabled(train), autocast:
            hidden = trunk(ids, mask).last_hidden_state
            if train:
                hidden.sum().backward()
    return live.peak


def _pieces(load: Workload, vocabulary: int) -> float:
    """Three float32 pieces of the logits: what one piece is turned into while it is read."""
    rows, logits = GPU_CHUNK if load.cuda else CPU_CHUNK
    positions = min(rows, load.rows * load.length)
    return 3 * 4.0 * min(max(logits, positions), positions * vocabulary)


def decoding_need(lm: MaskedLM, load: Workload) -> MemoryEstimate:
    """Bytes for decoding ``rows`` rows at a time; ``lm`` may be an ``outline``."""
    kind, config = type(lm.model), lm.model.config
    weights = sum(p.numel() * p.element_size() for p in meta_model(kind, config, load.dtype).parameters())
    return MemoryEstimate(
        weights, activations=_peak(kind, config, load, 2, train=False), head=_pieces(load, config.vocab_size)
    )


def training_need(lm: MaskedLM, load: Workload) -> MemoryEstimate:
    """Bytes for reinforcement learning on one process, the rollout included (it needs less than the update)."""
    kind, config = type(lm.model), lm.model.config
    model = _outlined(kind, config, load, train=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    two, three = (_peak(kind, config, load, n, train=True) for n in (2, 3))
    head = _pieces(load, config.vocab_size)
    if not load.lora:
        embedding = model.get_output_embeddings().weight
        head += embedding.numel() * embedding.element_size()
    tokens = load.prompt + load.length
    need = MemoryEstimate(
        weights,
        two + (three - two) * (config.num_hidden_layers - 2),
        head,
        trained * min(2, load.processes),
        2 * trained,
    )
    views = float(load.completions * load.steps * (8 * tokens + load.length))
    return replace(need, reference=weights if load.reference and not load.lora else 0.0, views=views)
