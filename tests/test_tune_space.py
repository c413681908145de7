"""The search for a decoder without a model: front and halving by hand, and the decoders that are tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from unmask import make_decoder
from unmask.decoding.decoder import PRESETS
from unmask.evaluation.tune import Standing, best, better_half, pareto, round_sizes, successive_halving
from unmask.evaluation.tune_space import candidates, plan_passes

# ---- the search, without a model -------------------------------------------------------------------------------------


def standings(*found: tuple[str, float, float]) -> list[Standing]:
    return [Standing(*f) for f in found]


def test_front_by_hand() -> None:
    found = standings(
        ("a", 0.5, 8), ("b", 0.3, 2), ("c", 0.3, 4), ("d", 0.6, 9), ("e", 0.5, 8), ("f", 0.2, 1), ("g", 0.4, 2)
    )
    # c is no better than b at more passes, g beats b at the same, e equals a, which comes first.
    assert [s.name for s in pareto(found)] == ["f", "g", "a", "d"]
    assert pareto([]) == []


def test_better_half_by_hand() -> None:
    found = standings(
        ("a", 0.5, 8), ("b", 0.1, 1), ("c", 0.5, 6), ("d", 0.4, 9), ("e", 0.4, 7), ("f", 0.0, 2), ("g", 0.5, 7)
    )
    # Front: b, c. Then a (8 passes) before g (7) at 0.5. Half of seven is four; d and e are left for a larger least.
    assert [s.name for s in better_half(found, 1)] == ["a", "b", "c", "g"]
    assert [s.name for s in better_half(found, 5)] == ["a", "b", "c", "d", "g"]
    assert [s.name for s in better_half(found, 6)] == ["a", "b", "c", "d", "e", "g"]
    assert better_half(found, 99) == found
    assert [s.name for s in better_half(found[:2], 1)] == ["a"]  # both are on the front


def test_best_is_the_cheapest_of_ties() -> None:
    assert best(standings(("a", 0.4, 1), ("b", 0.5, 8), ("c", 0.5, 6), ("d", 0.5, 6))).name == "c"


def test_rounds() -> None:
    assert round_sizes(128) == [8, 16, 32, 64, 128]
    assert round_sizes(100) == [8, 16, 32, 64, 100]
    assert round_sizes(8) == [8] and round_sizes(3) == [3] and round_sizes(9) == [8, 9]


def test_halving_by_hand() -> None:
    # value and passes on 8, 16 and 32 problems
    table = {
        "a": [(0.5, 4.0), (0.5, 4.0), (0.50, 4.0)],
        "b": [(0.6, 5.0), (0.6, 5.5), (0.55, 5.0)],  # over the budget on 16: out, whatever follows
        "c": [(0.9, 5.1)],  # over it at once
        "d": [(0.1, 5.0)],
        "e": [(0.2, 4.5)],
        "f": [(0.3, 5.0), (0.7, 5.0), (0.40, 5.0)],
    }
    asked: list[tuple[list[str], int]] = []

    def measure(names: Sequence[str], size: int) -> list[Standing]:
        asked.append((list(names), size))
        return [Standing(name, *table[name][(8, 16, 32).index(size)]) for name in names]

    left = successive_halving("abcdef", [8, 16, 32], measure, 5.0, 1)
    # 8: within are a b d e f; three go on: a and b (the front), then f. 16: b is out; of a and f one goes on.
    assert asked == [(list("abcdef"), 8), (["a", "b", "f"], 16), (["f"], 32)]
    assert left == [Standing("f", 0.4, 5.0)]
    asked.clear()
    assert [s.name for s in successive_halving("abcdef", [8, 16, 32], measure, 5.0, 2)] == ["a", "f"]


# ---- the space -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 16, 100, 128, 256])
@pytest.mark.parametrize("early_stop", [True, False])
def test_candidates_are_different_exact_and_near_the_budget(length: int, early_stop: bool) -> None:
    for budget in (1, 2, 7, 8, 32, 300):
        presets, others = candidates(budget, length, early_stop, [])
        decoders = [make_decoder(spec, max_new_tokens=length) for spec in (*presets, *others)]
        assert len({replace(d, name="") for d in decoders}) == len(decoders) < 250
        assert all(d.top_p == 1 and d.cache == "none" and d.temperature == 0 and d.cfg_scale == 0 for d in decoders)
        assert all(spec.split(":")[0] in PRESETS for spec in presets)
        assert any(plan_passes(d) <= budget and d.threshold is None for d in decoders[: len(presets)])
        if not early_stop:
            assert all(d.threshold is not None or plan_passes(d) <= budget for d in decoders)


def test_the_space_holds_every_family() -> None:
    presets, others = candidates(8, 128, True, [])
    assert {"ass", "eoser-ass", "full:steps=8", "semi-ar:steps=8", "threshold", "hybrid"} <= set(presets)
    assert not any("dream" in spec for spec in presets)
    for spec in (
        "full:steps=4",
        "full:steps=8,confidence=margin",
        "full:threshold=0.5",
        "eoser:gamma_min=0.01,steps=16",
        "hard-eos:steps=24",
        "hard-eos:threshold=0.9",
        "semi-ar:block_length=16,steps=16,confidence=entropy",
        "threshold:block_length=64,threshold=0.7,confidence=margin",
        "hybrid:block_length=64,confidence=entropy",
        "ass:blocks=7",
        "eoser-ass:gamma_min=0.1,blocks=3",
    ):
        assert spec in others, spec
    # ascending plans take 7 passes: those of a budget of 32 are only the presets
    assert not any("ass" in spec for spec in candidates(32, 128, True, [])[1])
    # one step a block commits all that is open, so the confidence makes no difference
    assert (
        "semi-ar:block_length=16,steps=8" in others
        and "semi-ar:block_length=16,steps=8,confidence=margin" not in others
    )


def test_guidance_is_tried_at_half_the_passes() -> None:
    plain, guided = (candidates(8, 128, False, scales)[1] for scales in ([], [0.5]))
    added = [make_decoder(spec) for spec in guided if spec not in plain]
    assert set(plain) <= set(guided) and added and all(d.cfg_scale == 0.5 for d in added)
    assert max(plan_passes(d) for d in added if d.threshold is None) == 8
    assert {"full:steps=2,cfg_scale=0.5", "full:steps=4,cfg_scale=0.5"} <= set(guided)
    assert plan_passes(make_decoder("full:steps=4,cfg_scale=0.5")) == 8
