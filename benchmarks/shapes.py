"""Kernels, bytes and live memory of a forward pass at full size, from tensors without data: predicted, not measured.

Everything runs as it would, but that an operation only works out its result's shape. A kernel is an operation that is no view;
its bytes are those of its operands and results (of a look-up, twice its result).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.config import BenchShapes
from unmask.decoding import make_decoder
from unmask.decoding.canvas import Canvases
from unmask.decoding.loop import DecodingLoop
from unmask.decoding.score import score_states
from unmask.models import head
from unmask.models.adapters import adapter_config, add_adapter
from unmask.models.masked_lm import MaskedLM

GIB = 2**30
LOOKUPS = ("embedding", "index", "index_select", "gather")


class Counter(TorchDispatchMode):
    """Counts what is done while it is on: ``kernels``, their ``bytes``, ``peak`` (the most bytes made meanwhile and alive)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.peak = 0, 0, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not made or func.is_view or func._schema.name in ("aten::detach", "aten::_unsafe_view"):
            return result
        lookup = func._schema.name.removeprefix("aten::") in LOOKUPS
        self.kernels += 1
        self.bytes += sum(x.nbytes for x in (made + made if lookup else made + given))
        known = {x.untyped_storage()._cdata for x in given}
        for x in made:
            storage = x.untyped_storage()
            if storage._cdata not in known:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if not self.kernels % 50:  # a traced graph is freed in cycles, a real one at once
            gc.collect()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def run(config: BenchShapes, progress: Callable[[str], None]) -> dict[str, Any]:
    """Every cell, here: it takes seconds."""
    cells = []
    for spec in config.decoder:
        progress(f"a pass of {spec}")
        cells.append({"work": f"{spec}, first pass", **measure(config, spec)})
    for checkpointing in (False, True):
        work = "forward and backward, LoRA" + ", checkpointed" * checkpointing
        progress(work)
        cells.append({"work": work, **measure(config, None, checkpointing)})
    return common.write_result(config, cells)


def table(config: BenchShapes, result: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
    """Title, and text by heading for each cell."""
    rows = [
        {
            "work": c["work"],
            "kernels": f"{c['kernels']:,}",
            "GB moved": f"{c['bytes'] / 1e9:.1f}",
            "TFLOP": f"{c['flops'] / 1e12:.1f}",
            "live GiB beside weights": f"{c['peak'] / GIB:.2f}",
            "weights GiB": f"{c['weights'] / GIB:.2f}",
        }
        for c in result["cells"]
    ]
    size = f"{config.rows} rows of {config.prompt} + {config.length} tokens"
    return f"predicted, {config.n_layers} layers of {config.d_model}, {size}", rows


def measure(config: BenchShapes, spec: str | None, checkpointing: bool = False) -> dict[str, Any]:
    """One pass of the decoder ``spec``, or (None) forward and backward of states that score ``length / steps`` tokens."""
    rows, length, width = config.rows, config.length, config.prompt
    prompt, mask = torch.ones(rows, width, dtype=torch.int64), torch.ones(rows, width, dtype=torch.bool)
    blank = torch.full((rows, length), 0)
    fresh = Canvases.new(prompt, mask, blank, 0, torch.arange(rows), range(rows))  # looks at its data
    lm = common.stand_in(config, "bfloat16", "meta")
    if spec is None:
        lm = add_adapter(lm, adapter_config(config.lora, config.lora), 0)
    with ExitStack() as stack:
        if spec is None:  # autocast is for devices that exist
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            _pretend_on_cpu(lm.model)
        stack.enter_context(patch.object(head, "CPU_CHUNK", head.GPU_CHUNK))
        whole = lambda module, apply, mask_id: head.Head(apply, mask_id, module.weight)  # noqa: E731
        stack.enter_context(patch.object(head.Head, "of", whole))  # which wants a plain Parameter
        work = _decode(lm, fresh, spec) if spec is not None else _score(config, lm, checkpointing)
        weights = sum(p.nbytes for p in lm.model.parameters())
        flops = stack.enter_context(FlopCounterMode(display=False))
        gc.freeze()  # what is there already need not be looked at again and again
        stack.callback(gc.unfreeze)
        counter = stack.enter_context(Counter())
        work()
        return {
            "kernels": counter.kernels,
            "bytes": counter.bytes,
            "peak": counter.peak,
            "weights": weights,
            "flops": flops.get_total_flops(),
        }


def _decode(lm: MaskedLM, fresh: Canvases, spec: str) -> Callable[[], Any]:
    tensors: dict[str, Any] = {k: v.to("meta") for k, v in vars(fresh).items() if isinstance(v, Tensor)}
    rows = replace(fresh, **tensors)
    loop = DecodingLoop(lm, make_decoder(spec, max_new_tokens=rows.length), early_stop=False)
    return lambda: loop.advance(rows)


def _pretend_on_cpu(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _score(config: BenchShapes, lm: MaskedLM, checkpointing: bool) -> Callable[[], Any]:
    from peft.helpers import disable_input_dtype_casting

    count = config.rows * config.length // config.steps
    if checkpointing:
        lm.model.activation_checkpointing_enable({"use_reentrant": False})
        lm.model.train()
    ids = torch.ones(config.rows, config.prompt + config.length, dtype=torch.int64)
    at = (torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))

    def work() -> None:
        with disable_input_dtype_casting(lm.model), torch.autocast("cpu", torch.bfloat16):
            logprob, _ = score_states(lm, ids, None, at, at[0], prompt=config.prompt, w=0.0)
        logprob.sum().backward()

    return work
