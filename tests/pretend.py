"""A GPU that is none: decoders and trainings on a device of its own, whose tensors hold CPU numbers.

``python pretend.py decode``, ``train``, ``benchmarks`` fail where an operation meets tensors of two devices, as on a GPU. The
first two fail also where results are not the CPU's, and where the host waits for the device more often than is written here.
Run with PYTHONPATH=. from the project's folder; the device is registered for the whole process.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers.training_args
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import benchmarks.decode
import benchmarks.memory
import benchmarks.rl
import unmask
from benchmarks.config import BenchDecode, BenchMemory, BenchRL
from benchmarks.gpu import same_tokens
from conftest import PROMPTS, SEEDS, saved, toy
from unmask.decoding import PRESETS, decode, decode_each, make_decoder
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.evaluate import evaluate
from unmask.models.head import Head
from unmask.models.masked_lm import MaskedLM
from unmask.rl.config import DiffusionGRPOConfig, DistillConfig
from unmask.rl.distill import DistillTrainer
from unmask.rl.objectives import OBJECTIVES
from unmask.rl.trainer import DiffusionGRPOTrainer
from unmask.training.config import SFTConfig
from unmask.training.sft import SFTTrainer

_setup_privateuseone_for_python_backend("pretend")
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=…) is made on the CPU and copied, as on CUDA
DEVICE = torch.device("pretend", 0)
WAITS: Counter[tuple[str, str]] = Counter()
"""Where the host waited: the function of the package that began it (see ``PARTS``), and operation, file and line."""
PARTS = ("advance", "finished", "update", "loss_at", "training_step")
LENGTH = 32


def record_wait(operation: str) -> None:
    frame: Any = sys._getframe(2)
    place, part = "", ""
    while frame is not None:
        code = frame.f_code
        if "unmask" in Path(code.co_filename).parts:
            place = place or f"{operation} in {Path(code.co_filename).name}:{frame.f_lineno}"
            part = part or code.co_name * (code.co_name in PARTS)
        frame = frame.f_back
    WAITS[part, place] += 1


def waits(*parts: str) -> Counter[str]:
    """The waits of some ``PARTS``."""
    found: Counter[str] = Counter()
    for (part, place), count in WAITS.items():
        if part in parts:
            found[place] += count
    return found


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU numbers; its result is on the device where an argument or ``device`` is."""
    name, leaves = func._schema.name.removeprefix("aten::"), tree_leaves((args, kwargs))
    mine = [x for x in leaves if isinstance(x, Pretended)]
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Pretended) and x.dim()]
    asked = kwargs.get("device")
    here = (torch.device(asked).type == "pretend") if asked is not None else bool(mine)
    assert not (mine and others) or name == "copy_", f"{name}: tensors on two devices"
    indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
    chosen = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
    moved = (name == "_to_copy" and bool(mine) != here) or bool(mine and others)
    if (mine and (chosen or name in ("_local_scalar_dense", "nonzero", "equal"))) or moved:
        record_wait(name)
    args, kwargs = tree_map(lambda x: x.elem if isinstance(x, Pretended) else x, (args, kwargs))
    out = func(*args, **(kwargs | {"device": "cpu"} if here and "device" in kwargs else kwargs))
    known = {id(x.elem): x for x in mine}  # what was changed in place
    return tree_map(lambda x: known.get(id(x), Pretended(x)) if here and type(x) is Tensor else x, out)


class Pretended(Tensor):
    """A tensor that says it is on the device."""

    elem: Tensor

    def __new__(cls, elem: Tensor) -> Pretended:
        self = Tensor._make_wrapper_subclass(cls, elem.shape, elem.stride(), dtype=elem.dtype, device=DEVICE)
        self.elem = elem.detach()
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        record_wait("tolist")
        return self.elem.tolist()


class Mode(TorchDispatchMode):
    """For what makes tensors from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def on_device(lm: MaskedLM) -> MaskedLM:
    for module in lm.model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else torch.nn.Parameter(Pretended(p.data))
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else Pretended(b)
    return lm


def weights(model: Any) -> list[Tensor]:
    return [p.elem if isinstance(p, Pretended) else p.detach() for p in model.parameters()]


# ---- decoding ----------------------------------------------------------------------------------------------------------

CACHED = "threshold:block_length=8,threshold=0.2,cache=dual"
SPECS = [
    *PRESETS,
    "full:cfg_scale=1",
    "full:top_p=0.9",
    "hybrid:block_length=8,cache=prefix",
    "semi-ar:block_length=8,cache=dual",
]
SPECS += [CACHED, "threshold:threshold=0.2"]
IN_BLOCKS = ["eoser-ass", "threshold:block_length=8,threshold=0.2", "full:cfg_scale=1", "full:cache=none"]
MORE_WAITS = {"credit": 1, CACHED: 2}
"""Of each pass, beside the two of every decoder that is not static: how many positions are open, and which rows are done."""


def check_decoding(lm: MaskedLM, pretended: MaskedLM, spec: str) -> None:
    decoder = make_decoder(spec, max_new_tokens=LENGTH, temperature=0.0 if spec == "credit" else 1.0)
    if decoder.schedule == "uniform":
        decoder = decoder.replace(steps=8)
    prompts, seeds = PROMPTS[:2], SEEDS[:2]
    expected = decode(lm, *lm.encode(prompts), decoder, seeds)
    WAITS.clear()
    forwards: list[None] = []
    hook = pretended.model.register_forward_hook(lambda *_: forwards.append(None))
    with Mode():
        found: Any = decode(pretended, *pretended.encode(prompts), decoder, seeds)
    hook.remove()
    assert torch.equal(found.tokens.elem, expected.tokens), spec
    assert (found.logprob.elem - expected.logprob).abs().max() < 1e-4, spec
    waited, blocks = waits("advance", "finished"), lm.block_length is not None
    exact = blocks and decoder.cache != "none"
    each = 2 * (decoder.adaptive or blocks) + MORE_WAITS.get(spec, 0) + exact
    passes = len(forwards) - exact  # one is of the prompts
    assert waited.total() == each * passes + 2 * exact, (spec, passes, waited)


def check_queue(lm: MaskedLM, pretended: MaskedLM) -> None:
    """Rows that leave early and others that join them."""

    def texts(lm: MaskedLM) -> dict[int, list[int]]:
        decoder, found = make_decoder("eoser", max_new_tokens=LENGTH, temperature=1.0), {}
        for numbers, done in decode_each(lm, PROMPTS, decoder, SEEDS, batch_size=2):
            found |= dict(zip(numbers, done.tokens.tolist(), strict=True))
        return found

    expected = texts(lm)
    with Mode():
        assert texts(pretended) == expected


# ---- training ----------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def by_text(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


UPDATE_WAITS = dict.fromkeys(("one-step", "diffu", "coupled", "espo", "gdpo"), 7) | dict.fromkeys(
    ("cj", "agrpo", "tracerl"), 8
)
UPDATE_WAITS |= {"justgrpo": 11, "spg": 11, "vrpo": 14}
"""Of an update: one a forward pass (justgrpo has four, spg and vrpo two), and what is drawn, counted and logged."""


def check_training(name: str, train: Callable[..., Any], count: int, tolerance: float = 1e-5) -> None:
    """The weights that the CPU gets, and how often an update waits."""
    plain = {"optim": "sgd"}  # (AdamW's first step is the sign of a gradient, be it as small as rounding)
    settings: dict[str, Any] = {
        "bf16": False,
        "report_to": [],
        "max_steps": 1,
        "learning_rate": 0.01,
        "trainer_args": plain,
    }
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    with TemporaryDirectory() as folder:
        expected = weights(train(toy(n_layers=1), output_dir=f"{folder}/cpu", **settings))
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
        settings["trainer_args"] = {
            **plain,
            "use_cpu": False,
            "save_strategy": "no",
        }  # (these tensors have no storage to save)
        WAITS.clear()
        with Mode():
            found = weights(train(on_device(toy(n_layers=1)), output_dir=f"{folder}/device", **settings))
    assert max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) < tolerance, name
    waited = waits("training_step" if name == "distillation" else "update", "loss_at")
    assert waited.total() == count, (name, count, waited)


def reinforce(lm: MaskedLM, **settings: Any) -> Any:
    values: dict[str, Any] = {"max_completion_length": 16, "num_generations": 4, "per_device_train_batch_size": 8}
    config = DiffusionGRPOConfig(**values | settings)
    paid = (None, config) if config.pairs else (by_text, config, ROWS)
    trainer = DiffusionGRPOTrainer(lm, *paid)
    trainer.train()
    return trainer.lm.model


def prefer(lm: MaskedLM, output_dir: str, **settings: Any) -> Any:
    file = Path(output_dir).parent / "pairs.jsonl"
    file.write_text("".join(json.dumps({**row, "chosen": "1+2", "rejected": "3"}) + "\n" for row in ROWS))
    settings |= {"objective": "vrpo:draws=2", "beta": 0.1, "pairs": str(file), "num_generations": 2}
    return reinforce(lm, output_dir=output_dir, **settings)


def distill(lm: MaskedLM, output_dir: str, **settings: Any) -> Any:
    folder, task = Path(output_dir).parent, ["countdown:style=compact,max_value=6"]
    if lm.device.type == "cpu":  # the first of the two trainings
        model, teacher = saved(lm, folder / "model"), str(folder / "teacher")
        made = {"model": model, "task": task, "decoder": ["full"], "split": "train", "limit": 8, "max_new_tokens": 16}
        evaluate(EvalConfig(**made, trajectories=True, output=teacher))
    values: dict[str, Any] = {"tasks": task, "teacher": [str(folder / "teacher")], "min_reward": 0.0, "problems": 8}
    values |= {"max_completion_length": 16, "per_device_train_batch_size": 4, "validation_problems": 2}
    trainer = DistillTrainer(lm, DistillConfig(output_dir=output_dir, **values | settings))
    trainer.train()
    return trainer.lm.model


def fine_tune(lm: MaskedLM, **settings: Any) -> Any:
    values: dict[str, Any] = {
        "tasks": ["sudoku:style=compact"],
        "problems": [8],
        "canvas": [96],
        "validation_problems": 2,
    }
    trainer = SFTTrainer(lm, SFTConfig(**values | settings, per_device_train_batch_size=4))
    trainer.train()
    return trainer.lm.model


# ---- benchmarks --------------------------------------------------------------------------------------------------------


def check_benchmarks() -> None:
    """Every measurement of ``python -m benchmarks gpu`` runs on the device; what it says of time and memory means nothing."""
    torch.pretend.get_rng_state = torch.pretend.set_rng_state = lambda *_: None  # type: ignore[attr-defined]
    for name, nothing in {"synchronize": None, "reset_peak_memory_stats": None, "max_memory_allocated": 0}.items():
        setattr(torch.cuda, name, lambda nothing=nothing: nothing)
    autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel)  # it changes nothing here
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
    shape: Any = {"vocabulary": 256, "d_model": 32, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 64, "prompt": 8}
    shape["device"] = str(DEVICE)
    decoding, memory = (
        kind(**shape, length=(LENGTH,))
        for kind in (partial(BenchDecode, passes=2, repeats=1), partial(BenchMemory, dtype="float32"))
    )
    update = BenchRL(**shape, length=LENGTH, steps=(8,))
    small = {"cpu": toy(n_layers=1), str(DEVICE): on_device(toy(n_layers=1))}
    unmask.load = lambda name, device="cpu": small[device]  # (whose threads know no device of Python's)
    with Mode():
        for spec, temperature in (("full:steps=8", 0.0), ("eoser-ass", 1.0)):
            assert benchmarks.decode.measure(decoding, "stand-in", LENGTH, spec, temperature)["passes"]
        for way in ("cj", "bare", "plain", "one-step"):
            assert benchmarks.rl.measure(update, way, 8)["flops"]
        for work in ("decode", "lora checkpointing", "all"):
            assert benchmarks.memory.measure(memory, work, LENGTH, 2)["formula"]
        for name in set(PRESETS) - {"full", "eoser-ass"}:  # ``decode`` has all of them
            del PRESETS[name]
        assert "full" in same_tokens(str(DEVICE), 1, LENGTH)


if __name__ == "__main__":
    Head.of = classmethod(lambda cls, module, apply, mask_id: cls(apply, mask_id, module.weight))  # type: ignore
    if sys.argv[1] == "decode":
        for shape in ({}, {"block_length": 8}):
            models = toy(n_layers=1, **shape), on_device(toy(n_layers=1, **shape))
            for spec in IN_BLOCKS if shape else SPECS:
                check_decoding(*models, spec)
            check_queue(*models)
    elif sys.argv[1] == "benchmarks":
        check_benchmarks()
    else:
        for objective in OBJECTIVES:
            decoder = "semi-ar:block_length=1" if objective == "justgrpo" else "eoser-ass"
            train = prefer if objective == "vrpo" else partial(reinforce, objective=objective, decoder=decoder)
            check_training(objective, train, UPDATE_WAITS[objective])
        check_training("adapter", partial(reinforce, lora_r=4, beta=0.04), 8)
        check_training("distillation", distill, 35)  # its decode included, whose steps have none
        check_training("sft", fine_tune, 12)
        check_training("muon", partial(fine_tune, optimizer="muon"), 12, tolerance=1e-3)  # which works in bfloat16
