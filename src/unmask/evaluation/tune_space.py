"""The decoders that ``unmask tune`` tries within a budget: all greedy and exact, so that each may also lead a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from unmask.config import with_parameters
from unmask.decoding import Decoder, make_decoder
from unmask.decoding.decoder import PRESETS

CONFIDENCES: list[dict[str, str]] = [{}, {"confidence": "margin"}, {"confidence": "entropy"}]
EOS_RULES = ("eoser:gamma_min=0.01", "eoser:gamma_min=0.1", "eoser:gamma_min=0.4", "hard-eos")
ASCENDING_RULES = ("ass", "eoser-ass:gamma_min=0.01", "eoser-ass:gamma_min=0.1", "eoser-ass:gamma_min=0.4")
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
PARTS = (2, 4, 8, 16)  # block lengths, as parts of the canvas
PACES = (0.5, 1.0, 1.5, 2.0, 3.0)  # steps as multiples of the budget; above 1 for plans that early stop may end sooner
COMPARED_PACES, COMPARED_THRESHOLDS = (1.0, 2.0), (0.7, 0.9)  # where every confidence is tried
LEAST = 0.25  # a plan of fewer passes than this share of the budget belongs to the search of a smaller budget


def candidates(budget: int, length: int, early_stop: bool, cfg_scales: list[float]) -> tuple[list[str], list[str]]:
    """The decoders that may take ``budget`` passes a problem or less on a canvas of ``length`` tokens.

    Args:
        budget, length: 1 or more. early_stop: whether rows may end before their plan does.
        cfg_scales: strengths of guidance to try beside none.

    Returns:
        Specs of the presets, and of all others. A preset whose plan is too long is also there with its steps brought down
        to the budget; one whose blocks do not divide the canvas is not. No two decode alike.
    """
    presets, others = list(_presets(budget, length)), []
    guided: list[tuple[int, dict[str, float]]] = [(budget // 2, {"cfg_scale": scale}) for scale in cfg_scales]
    for passes, guidance in ((budget, {}), *guided):
        for spec, compared in _space(passes, length):
            confidences = CONFIDENCES if compared else CONFIDENCES[:1]
            others += [with_parameters(spec, **confidence, **guidance) for confidence in confidences]
    first: dict[tuple[Any, ...], str] = {}
    for spec in (*presets, *others):
        decoder = make_decoder(spec, max_new_tokens=length)
        if _may_fit(decoder, budget, early_stop, 0.0 if spec in presets else LEAST):
            first.setdefault(behavior(decoder), spec)
    return [s for s in first.values() if s in presets], [s for s in first.values() if s not in presets]


def _presets(budget: int, length: int) -> Iterator[str]:
    for name, settings in PRESETS.items():
        block = settings.get("block_length", length)
        if length % block or settings.get("top_p", 1) < 1 or "initial_length" in settings:
            continue
        yield name
        if "schedule" not in settings and make_decoder(name, max_new_tokens=length).passes > budget:
            yield from (with_parameters(name, steps=n) for n in _steps(budget, length, length // block, (1.0,)))


def _space(passes: int, length: int) -> Iterator[tuple[str, bool]]:
    """The specs of all families, each with whether every confidence is tried there."""

    def uniform(start: str, parts: int) -> Iterator[tuple[str, bool]]:
        compared = _steps(passes, length, parts, COMPARED_PACES)
        return ((with_parameters(start, steps=n), n in compared) for n in _steps(passes, length, parts))

    for start in ("full", *EOS_RULES):
        yield from uniform(start, 1)
        yield from ((with_parameters(start, threshold=t), False) for t in THRESHOLDS)
    for parts in (n for n in PARTS if length % n == 0):
        block = {"block_length": length // parts}
        yield from uniform(with_parameters("semi-ar", **block), parts)
        yield from ((with_parameters("threshold", **block, threshold=t), t in COMPARED_THRESHOLDS) for t in THRESHOLDS)
        yield with_parameters("hybrid", **block), True
    for start in ASCENDING_RULES:
        yield from ((with_parameters(start, blocks=n), False) for n in range(1, max(2, length.bit_length())))


def _steps(passes: int, length: int, parts: int, paces: tuple[float, ...] = PACES) -> list[int]:
    """Step counts at multiples of ``passes`` that ``parts`` blocks of one canvas can take."""
    wanted = (min(int(passes * pace), length) // parts * parts for pace in paces)
    return list(dict.fromkeys(steps for steps in wanted if steps))


def _may_fit(decoder: Decoder, budget: int, early_stop: bool, least: float) -> bool:
    """Whether it is worth measuring how many passes it takes; a plan shorter than ``least`` budgets (or longest plans, where
    these are shorter than the budget) is not."""
    blocks = len(set(decoder.plan.horizon))
    if decoder.adaptive:  # may finish a block in one pass
        return blocks * decoder.copies <= budget * (PACES[-1] if early_stop else 1)
    stops = early_stop and (blocks > 1 or decoder.eos != "keep")
    longest = min(budget, decoder.plan.length * decoder.copies)
    return least * longest <= decoder.passes <= budget * (PACES[-1] if stops else 1)


def behavior(decoder: Decoder) -> tuple[Any, ...]:
    """The same for two decoders of the space if and only if they do the same: what their names and settings come to.

    A step that commits all that is open asks neither the confidence nor the EOS rule; a plan of such steps asks none.
    """
    plan = decoder.plan
    chooses = [commits < open_ for commits, open_ in zip(plan.commits, plan.open, strict=True)]
    filled = (plan.commits, plan.horizon, decoder.cfg_scale)
    if not any(chooses):
        return filled
    gammas = [decoder.gamma(p) for p, asked in zip(plan.progress, chooses, strict=True) if asked]
    rule = (decoder.eos, *(gammas if decoder.eos == "reject" else ()))
    extra = (decoder.leap_radius, decoder.leap_threshold, decoder.stable, decoder.credit, decoder.entropy_bound)
    return (*filled, decoder.threshold, decoder.confidence, rule, extra)
