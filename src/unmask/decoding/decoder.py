"""Decoder: everything that decides how a canvas is filled, as one frozen record with a name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from unmask.config import build, split_spec
from unmask.decoding.confidence import CONFIDENCES
from unmask.decoding.plan import Plan, ascending, uniform
from unmask.errors import UserError, unknown
from unmask.io.files import expand_home, read_yaml


@dataclass(frozen=True)
class Decoder:
    """A decoding configuration. Equal decoders decode equally; ``config()`` travels with every result.

    Raises:
        UserError: on construction, for any value out of range or a plan that cannot be made.
    """

    name: str = "full"
    max_new_tokens: int = 128
    """Canvas length L."""
    schedule: Literal["uniform", "ascending"] = "uniform"
    steps: int | None = None
    """Steps of a uniform schedule; default L/2 (L with a threshold). An ascending one has floor(log2 L)."""
    block_length: int | None = None
    """Blocks of this many tokens, left to right."""
    blocks: int = 1
    """Ascending only: the paper's block form (the largest commits peeled off to the right)."""
    max_commit: int | None = None
    """Ascending only: no step commits more than this many tokens; there are more steps instead."""
    confidence: str = "low-confidence"
    eos: Literal["keep", "reject", "suppress", "exclude"] = "keep"
    """``reject``: EOSER. ``suppress``: end tokens only once nothing else is left. ``exclude``: so too, and the others'
    confidence is their probability among the tokens that are no end tokens (LLaDA's evaluation)."""
    gamma_min: float = 0.4
    """EOSER's factor at the start; it grows to 1."""
    eos_tokens: Literal["eos", "eos+eot"] = "eos"
    """Which end tokens the EOS rule means: the canvas-filling EOS, or the end-of-turn token too."""
    temperature: float = 0.0
    top_p: float = 1.0
    """Sample among the most likely tokens whose probabilities first exceed this (no effect at temperature 0)."""
    cfg_scale: float = 0.0
    """Classifier-free guidance w: logits = u + (w + 1)(c - u), u with the prompt masked. Doubles the passes."""
    threshold: float | None = None
    """Also commit every open candidate whose score reaches this."""
    cache: Literal["none", "prefix", "dual"] = "none"
    """Approximate: within a block of the plan, reuse keys and values of what stands before the block (``prefix``) or on both
    sides of it (``dual``) from the block's first pass (Fast-dLLM)."""

    def __post_init__(self) -> None:
        if self.confidence not in CONFIDENCES:
            raise unknown("confidence", self.confidence, CONFIDENCES)
        if self.schedule == "ascending" and self.steps is not None:
            raise UserError(
                f"steps={self.steps} has no meaning in an ascending schedule, which has floor(log2 L): drop it"
            )
        if self.schedule == "uniform" and self.blocks != 1:
            raise UserError(f"blocks={self.blocks} belongs to the ascending schedule: use block_length here")
        if self.schedule == "uniform" and self.max_commit is not None:
            raise UserError(f"max_commit={self.max_commit} belongs to the ascending schedule: use steps here")
        if self.eos == "exclude" and self.confidence != "low-confidence":
            raise UserError(
                f"eos=exclude renormalizes probabilities, so it needs confidence=low-confidence, not {self.confidence}: "
                "use eos=suppress"
            )
        checks = {
            "gamma_min": 0 <= self.gamma_min <= 1,
            "temperature": 0 <= self.temperature < float("inf"),
            "top_p": 0 < self.top_p <= 1,
            "cfg_scale": 0 <= self.cfg_scale < float("inf"),
            "threshold": self.threshold is None or 0 < self.threshold <= 1,
        }
        ranges = {
            "gamma_min": "0 to 1",
            "temperature": "0 or more",
            "top_p": "above 0 up to 1",
            "cfg_scale": "0 or more",
            "threshold": "above 0 up to 1",
        }
        for field, fine in checks.items():
            if not fine:
                raise UserError(f"{field} of decoder {self.name!r} is {getattr(self, field)}: give {ranges[field]}")
        if self.max_new_tokens >= 2**15:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: give less than {2**15}")
        plan = self.plan  # refuses an impossible plan at once
        if self.cache != "none" and not any(a == b < plan.length for a, b in pairwise(plan.horizon)):
            raise UserError(
                f"cache={self.cache} saves nothing in decoder {self.name!r}: it needs a plan of several blocks, one of which "
                "takes more than one step; give block_length or leave the cache out"
            )

    @cached_property
    def plan(self) -> Plan:
        if self.schedule == "ascending":
            return ascending(self.max_new_tokens, self.blocks, self.block_length, self.max_commit)
        if self.steps is not None:
            return uniform(self.max_new_tokens, self.steps, self.block_length)
        default = self.max_new_tokens if self.threshold is not None else max(1, self.max_new_tokens // 2)
        if self.block_length and not self.max_new_tokens % self.block_length and self.threshold is None:
            default = self.max_new_tokens // self.block_length * max(1, self.block_length // 2)
        return uniform(self.max_new_tokens, default, self.block_length)

    @property
    def copies(self) -> int:
        """Rows of a forward pass that one sequence takes: guidance adds one."""
        return 2 if self.cfg_scale else 1

    @property
    def passes(self) -> int:
        """Forward passes (NFE) that the plan allows a sequence; guidance counts twice."""
        return self.plan.steps * self.copies

    def gamma(self, progress: float) -> float:
        """EOSER's factor at a clock reading in [0, 1]."""
        return self.gamma_min + (1 - self.gamma_min) * progress

    def config(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Decoder:
        return dataclasses.replace(self, **changes)


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-random": {"confidence": "random"},
    "semi-ar": {"block_length": 32},
    "semi-ar-random": {"block_length": 32, "confidence": "random"},
    "eoser": {"eos": "reject", "gamma_min": 0.4},
    "ass": {"schedule": "ascending"},
    "eoser-ass": {"schedule": "ascending", "eos": "reject", "gamma_min": 0.01},
    "hard-eos": {"eos": "suppress"},
    "llada-eval": {"eos": "exclude", "eos_tokens": "eos+eot"},  # and one token a step
    "threshold": {"block_length": 32, "threshold": 0.9},
    "hybrid": {"schedule": "ascending", "block_length": 32},
    "dream": {"confidence": "entropy", "temperature": 0.2, "top_p": 0.95},  # the same
}


def make_decoder(spec: str, **defaults: Any) -> Decoder:
    """A decoder from a preset with parameters (``eoser-ass:blocks=4,gamma_min=0.1``) or a YAML file of Decoder fields.

    Args:
        spec: preset spec, or the path of a .yaml file that may name a ``preset`` beside its fields.
        defaults: fields that hold unless the spec sets them, e.g. ``max_new_tokens=256``.

    Raises:
        UserError: for an unknown preset or parameter, or a value out of range.
    """
    name, parameters = split_spec(spec)
    values: dict[str, Any] = dict(parameters)
    label = expand_home(spec.strip())
    if name.endswith((".yaml", ".yml")):
        read = read_yaml(Path(name), "the decoder file")
        label = str(read.pop("name", Path(name).stem)) + label.removeprefix(name)
        name = read.pop("preset", "full")
        values = {**read, **parameters}
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown("decoder", str(name), PRESETS)
    if "name" in parameters:
        raise UserError(f"a decoder on the command line is named by its spec: drop name={parameters['name']}")
    values = {**defaults, **PRESETS[name], **values, "name": label}
    if name in ("dream", "llada-eval") and values.get("schedule", "uniform") == "uniform":
        values.setdefault("steps", values.get("max_new_tokens", Decoder.max_new_tokens))
    return build(Decoder, values, f"decoder {name!r}")
