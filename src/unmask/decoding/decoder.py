"""Decoder: everything that decides how a canvas is filled, as one frozen record with a name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from unmask.config import Registry, build, split_spec, with_parameters
from unmask.decoding.confidence import Confidence
from unmask.decoding.plan import Plan, divisors
from unmask.errors import UserError
from unmask.io.files import expand_home, read_yaml

APPROXIMATE = ("prefix", "dual")  # caches


@dataclass(frozen=True)
class Decoder:
    """A decoding configuration. Equal decoders decode equally; ``config()`` travels with every result.

    Raises UserError on construction, for any value out of range or a plan that cannot be made.
    """

    name: str = "full"
    max_new_tokens: int = 128
    """Canvas length L."""
    schedule: str = "uniform"
    """How many tokens each step commits: ``uniform``, ``ascending``, or one of your own (``SCHEDULES``)."""
    steps: int | None = None
    """Steps of a uniform schedule; default L/2 (L with a threshold or entropy bound). An ascending one has floor(log2 L)."""
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
    leap_radius: int = 0
    """Within so many positions of a candidate that reaches ``threshold``, ``leap_threshold`` is enough (LocalLeap)."""
    leap_threshold: float = 0.75
    stable: int = 0
    """The threshold counts only where the most likely token was the same in so many passes before (LESS)."""
    credit: float = 0.0
    """CreditDecoding's alpha: tokens that were the most likely before are scored, and chosen, as if more likely."""
    entropy_bound: float | None = None
    """Also commit, in order of score, while the candidates' entropies without the largest sum to so many nats (EB-Sampler)."""
    initial_length: int | None = None
    """The canvas begins with so many tokens, and grows and shrinks up to ``max_new_tokens`` with the share of end tokens among
    the candidates (rho-EOS)."""
    cache: Literal["auto", "none", "exact", "prefix", "dual"] = "auto"
    """``exact``: keep keys and values of finished blocks, which later ones do not change; block-causal models only, and what
    ``auto`` means there. Approximate, in models with full attention: within a block of the plan, reuse keys and values of what
    is before the block (``prefix``) or on both sides of it (``dual``) from the block's first pass (Fast-dLLM)."""

    def __post_init__(self) -> None:
        Confidence.of(self.confidence)
        if self.eos == "exclude" and self.confidence != "low-confidence":
            needs = f"needs confidence=low-confidence, not {self.confidence}"
            raise UserError(f"eos=exclude renormalizes probabilities, so it {needs}: use eos=suppress")
        for field, fine, allowed in (
            ("gamma_min", 0 <= self.gamma_min <= 1, "0 to 1"),
            # (divided by a smaller one, logits overflow)
            (
                "temperature",
                self.temperature == 0 or 1e-9 <= self.temperature < float("inf"),
                "0 or more, 1e-9 at least above 0",
            ),
            ("top_p", 0 < self.top_p <= 1, "above 0 up to 1"),
            ("cfg_scale", 0 <= self.cfg_scale <= 1e4, "0 or more, 10000 at most"),
            ("threshold", self.threshold is None or 0 < self.threshold <= 1, "above 0 up to 1"),
            ("leap_radius", 0 <= self.leap_radius < 2**15, f"0 or more, less than {2**15}"),
            ("leap_threshold", 0 < self.leap_threshold <= 1, "above 0 up to 1"),
            ("stable", 0 <= self.stable < 2**15, f"0 or more, less than {2**15}"),
            ("credit", 0 <= self.credit < float("inf"), "0 or more"),
            ("entropy_bound", self.entropy_bound is None or 0 <= self.entropy_bound < float("inf"), "0 or more"),
            ("initial_length", self.initial_length is None or self.initial_length > 0, "1 or more"),
            ("max_new_tokens", self.max_new_tokens < 2**15, f"less than {2**15}"),
        ):
            if not fine:
                raise UserError(f"{field} of decoder {self.name!r} is {getattr(self, field)}: choose {allowed}")
        for field in ("leap_radius", "stable"):
            if getattr(self, field) and self.threshold is None:
                raise UserError(
                    f"{field} of decoder {self.name!r} qualifies its threshold, and it has none: set threshold"
                )
        if self.credit and (self.temperature or self.confidence != "low-confidence" or self.eos == "exclude"):
            raise UserError(
                f"credit of decoder {self.name!r} is for the most likely tokens and their probabilities: set temperature=0, "
                "confidence=low-confidence, and another eos than exclude"
            )
        if self.initial_length and self.cache not in ("auto", "none"):
            raise UserError(
                f"initial_length of decoder {self.name!r} changes the canvas, which no cache follows: set cache=none"
            )
        plan = self.plan  # refuses an impossible plan at once
        if self.cache in APPROXIMATE and not any(a == b < plan.length for a, b in pairwise(plan.horizon)):
            needs = "it needs a plan of several blocks, one of which takes more than one step"
            says = f"cache={self.cache} saves nothing in decoder {self.name!r}: {needs}"
            raise UserError(f"{says}; set block_length or leave the cache out")

    @classmethod
    def from_preset(cls, preset: str, **fields: Any) -> Decoder:
        """A preset with some fields changed: ``Decoder.from_preset("eoser-ass", blocks=4)``. Raises UserError."""
        return make_decoder(with_parameters(preset, **fields))

    @cached_property
    def plan(self) -> Plan:
        plan = SCHEDULES.resolve(self.schedule)(self)
        if plan.length != self.max_new_tokens:
            plans = f"schedule {self.schedule!r} plans {plan.length} tokens"
            raise UserError(f"{plans} for a canvas of {self.max_new_tokens}")
        return plan

    def within(self, block: int | None) -> Decoder:
        """This decoder for a model whose attention is block-causal, in blocks of so many tokens (None: full attention).

        The plan's blocks are then the model's, or smaller ones that divide them; the schedule runs inside each. A canvas is
        rounded up to whole blocks, its steps with it. Raises UserError for a plan that commits across blocks, and for a cache
        that does not fit.
        """
        if block is None:
            if self.cache == "exact":
                other = "use cache=prefix or dual (approximate, within a plan's blocks), or none"
                raise UserError(f"cache=exact needs a block-causal model, and this one's attention is full: {other}")
            return self.replace(cache="none") if self.cache == "auto" else self
        blocks = f"the model's blocks of {block} tokens"
        if self.initial_length:
            raise UserError(
                f"decoder {self.name!r} changes the canvas as a whole, which {blocks} cannot see: leave initial_length out"
            )
        if self.cache in APPROXIMATE:
            raise UserError(f"cache={self.cache} approximates what cache=exact keeps exactly in {blocks}: use that")
        own = block if self.block_length is None or self.block_length % block == 0 else self.block_length
        if block % own:
            raise UserError(
                f"decoder {self.name!r} has blocks of {own} tokens, which cross {blocks}: choose one of {divisors(block)}"
            )
        if self.blocks != 1:
            raise UserError(
                f"blocks={self.blocks} of decoder {self.name!r} peels commits off across {blocks}: leave it out"
            )
        length, steps = -(-self.max_new_tokens // block) * block, self.steps
        if length != self.max_new_tokens:
            steps = steps and round(steps * length / self.max_new_tokens)
            _note(f"a canvas of {self.max_new_tokens} tokens is rounded up to {length}, whole blocks of {block}")
        fitted = self.replace(
            max_new_tokens=length, steps=steps, block_length=own, cache="exact" if self.cache == "auto" else self.cache
        )
        plan = zip(fitted.plan.done, fitted.plan.commits, fitted.plan.horizon, strict=True)
        if any((done - commits) // block != (horizon - 1) // block for done, commits, horizon in plan):
            raise UserError(
                f"decoder {self.name!r} plans commits across {blocks}: choose a schedule that fills them in turn"
            )
        return fitted

    @property
    def adaptive(self) -> bool:
        """Whether a step may commit more than the plan says."""
        return self.threshold is not None or self.entropy_bound is not None

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers, so that a row's seed matters."""
        return self.temperature > 0 or Confidence.of(self.confidence).noisy

    def check_draws(self, count: int, name: str) -> None:
        """Raises UserError where several completions of a prompt, the setting ``name``, would all be equal."""
        if count > 1 and not self.is_random:
            equal = f"decoder {self.name!r} draws no random numbers, so all would be equal"
            raise UserError(f"{name} is {count}, but {equal}: set a temperature")

    @property
    def copies(self) -> int:
        """Rows of a forward pass that one sequence takes: guidance adds one."""
        return 2 if self.cfg_scale else 1

    @property
    def passes(self) -> int:
        """Forward passes (NFE) that the plan allows a sequence; guidance counts twice."""
        return self.plan.steps * self.copies

    def gamma(self, progress: float) -> float:
        """EOSER's factor at the normalized decoding time ``progress`` in [0, 1]."""
        return self.gamma_min + (1 - self.gamma_min) * progress

    def config(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Decoder:
        return dataclasses.replace(self, **changes)


SCHEDULES: Registry[Callable[[Decoder], Plan]] = Registry("schedule")
"""Functions from a decoder to its plan by name; ``@SCHEDULES.register("name")`` adds one."""


@SCHEDULES.register("uniform")
def _uniform(d: Decoder) -> Plan:
    for field, default, instead in (("blocks", 1, "block_length"), ("max_commit", None, "steps")):
        if getattr(d, field) != default:
            raise UserError(f"{field}={getattr(d, field)} belongs to the ascending schedule: use {instead} here")
    block = d.block_length or max(1, d.max_new_tokens)
    steps = d.max_new_tokens // block * (block if d.adaptive else max(1, block // 2))
    return Plan.uniform(d.max_new_tokens, steps if d.steps is None else d.steps, d.block_length)


@SCHEDULES.register("ascending")
def _ascending(d: Decoder) -> Plan:
    if d.steps is not None:
        raise UserError(f"steps={d.steps} has no meaning in an ascending schedule, which has floor(log2 L): drop it")
    return Plan.ascending(d.max_new_tokens, d.blocks, d.block_length, d.max_commit)


PRESETS: Registry[dict[str, Any]] = Registry(
    "decoder",
    {
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
        "localleap": {"block_length": 32, "threshold": 0.9, "leap_radius": 4},
        "less": {"block_length": 32, "threshold": 0.75, "stable": 2},
        "credit": {"block_length": 32, "threshold": 0.8, "credit": 0.7},
        "eb": {"confidence": "entropy", "entropy_bound": 0.1},
        "rho-eos": {"block_length": 32, "threshold": 0.9, "initial_length": 64},
        "hybrid": {"schedule": "ascending", "block_length": 32},
        "dream": {"confidence": "entropy", "temperature": 0.2, "top_p": 0.95},  # the same
    },
)
"""Decoder fields by name; ``PRESETS["name"] = {…}`` adds one."""


def make_decoder(spec: str, **defaults: Any) -> Decoder:
    """A decoder from a preset with parameters (``eoser-ass:blocks=4,gamma_min=0.1``) or a YAML file of Decoder fields.

    The file may name a ``preset`` beside its fields. ``defaults`` hold unless the spec sets them. Raises UserError.
    """
    name, parameters = split_spec(spec)
    values: dict[str, Any] = dict(parameters)
    label = expand_home(spec.strip())
    if name.endswith((".yaml", ".yml")):
        read = read_yaml(Path(name), "the decoder file")
        label = str(read.pop("name", Path(name).stem)) + label.removeprefix(name)
        name = read.pop("preset", "full")
        values = {**read, **parameters}
    preset = PRESETS.resolve(str(name))
    if "name" in parameters:
        raise UserError(f"a decoder on the command line is named by its spec: drop name={parameters['name']}")
    values = {**defaults, **preset, **values, "name": label}
    if name in ("dream", "llada-eval") and values.get("schedule", "uniform") == "uniform":
        values.setdefault("steps", values.get("max_new_tokens", Decoder.max_new_tokens))
    return build(Decoder, values, f"decoder {name!r}")


@cache
def _note(message: str) -> None:
    """Say it once."""
    print(f"unmask: {message}", file=sys.stderr)
