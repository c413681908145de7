"""``unmask tune``: the best decoder within a budget of forward passes a problem, by successive halving.

Every candidate decodes a few validation problems; the better third goes on to twice as many, and so on; of the presets all
go on. What is over the budget is out. The best of the last round decode still more problems, a run-off; its winner and the
best preset then decode test problems that the search has not seen. Every measurement is a line of ``measurements.jsonl``, so
a killed search goes on where it stopped, and ends the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from unmask.errors import TooFewProblems, UserError
from unmask.evaluation.config import TuneConfig
from unmask.evaluation.evaluate import environment, prepare, run_cell
from unmask.evaluation.progress import Progress
from unmask.evaluation.prompts import task_prompts
from unmask.evaluation.records import FIX, check_problem, summarize
from unmask.evaluation.tune_space import candidates
from unmask.io.files import write_json, writing_to
from unmask.io.launcher import world_size
from unmask.io.schema import MEASURED
from unmask.io.store import Record, RecordStore, claim
from unmask.results.statistics import paired_difference, pareto_front

FIRST_ROUND = 16
"""Problems of the first round."""
ONE_IN = 3
"""One candidate in so many goes on after a round."""
MIN_SURVIVORS = 8
"""So many candidates go on at least, as far as they may be within the budget. Of the presets all do."""
NUM_FINALISTS = 6
"""So many go into the run-off, the best preset besides, and the best preset that cannot exceed the budget."""
STDERR_TOLERANCE = 2
"""Before the last round, a mean that is over the budget by no more than so many standard errors may still be within it."""


# ---- the search, without a model -------------------------------------------------------------------------------------


class Standing(NamedTuple):
    """What a decoder has achieved: ``value`` in [0, 1], its mean number of forward passes ``nfe``, its standard error."""

    name: str
    value: float
    nfe: float
    error: float = 0.0


def ranked(standings: Sequence[Standing]) -> list[Standing]:
    """By value; of ties the fewest passes, then the first."""
    return sorted(standings, key=lambda s: (-s.value, s.nfe))


def pareto(standings: Sequence[Standing]) -> list[Standing]:
    """Those that no other reaches with as few passes, by passes; of equals the first."""
    return pareto_front(standings, lambda s: (s.nfe, s.value))


def top_fraction(standings: Sequence[Standing], least: int) -> list[Standing]:
    """One in three of them, rounded up, or ``least``; in their order.

    The Pareto front comes first, then the larger value. Few problems leave many ties: of equal values the front holds the
    cheapest, so here more passes come first.
    """
    front = pareto(standings)
    by_value = sorted(standings, key=lambda s: (s not in front, -s.value, -s.nfe))
    kept = by_value[: max(least, math.ceil(len(standings) / ONE_IN))]
    return [s for s in standings if s in kept]


def in_run_off(finalists: Sequence[Standing], presets: Container[str], safe: Container[str]) -> list[str]:
    """Who decodes more problems, best first.

    Args:
        finalists: standings on the problems of the last round. presets, safe: which names are presets, and which cannot
            exceed the budget; one at least is both.
    """
    order = ranked(finalists)
    known = [s for s in order if s.name in presets]
    chosen = [*order[:NUM_FINALISTS], known[0], next(s for s in known if s.name in safe)]
    return [s.name for s in order if s in chosen]


def round_sizes(last: int) -> list[int]:
    """Problems of each round: 16, 32, 64, … and ``last``."""
    return [*takewhile(lambda size: size < last, (FIRST_ROUND * 2**i for i in count())), last]


def successive_halving(
    names: Sequence[str],
    sizes: Sequence[int],
    measure: Callable[[Sequence[str], int], list[Standing]],
    budget: float,
    least: int,
    safe: Container[str],
) -> list[Standing]:
    """Who is within the budget after the last round; the rounds before it leave room for chance.

    Args:
        sizes: problems of each round. measure: (names, problems) -> their standings on the first so many problems.
        least: how many go on at least, as far as they may be within the budget.
        safe: names of those that cannot exceed the budget. The best of them goes on too, so that there is a result.
    """
    within: list[Standing] = []
    for size in sizes:
        slack = STDERR_TOLERANCE if size < sizes[-1] else 0
        within = [s for s in measure(names, size) if s.nfe - slack * s.error <= budget]
        going_on = [*top_fraction(within, least), *[s for s in ranked(within) if s.name in safe][:1]]
        names = [s.name for s in within if s in going_on]
    return within


# ---- the search on a model -------------------------------------------------------------------------------------------


def shares(records: Sequence[Record], metric: str) -> tuple[list[float], list[float]]:
    """What each problem adds to the value, and what it could add."""
    if metric == "solved":
        return [float(r["solved"]) for r in records], [1.0] * len(records)
    return [r["points"] for r in records], [r["possible"] for r in records]


class Trials:
    """Decoders on validation and test problems: ``cells`` by (split, decoder), ``found`` by (split, decoder, index).

    Raises:
        UserError: for anything wrong in the request.
    """

    def __init__(self, config: TuneConfig, decoders: list[str], progress: Progress | None = None) -> None:
        self.config, self.metric = config.evaluation(decoders), config.metric
        self.progress: Progress = progress or (lambda label, done, total: None)
        try:
            self.prepared = prepare(self.config)
        except TooFewProblems as error:
            raise UserError(f"{error} (the larger of --limit and --run-off-limit)") from None
        cells, lm = self.prepared.cells, self.prepared.lm
        unseen = cells[0].task.problems("test", config.test_limit, config.seed)
        prompts = task_prompts(lm, cells[0].task, unseen)
        lm.encode(prompts, config.max_new_tokens)  # refuses now what is too long
        self.cells = {("validation", c.decoder_spec): c for c in cells}
        self.cells |= {("test", c.decoder_spec): replace(c, problems=unseen, prompts=prompts) for c in cells}
        path, schema = Path(config.output) / "measurements.jsonl", {"split": str, "decoder": str, **MEASURED}
        self.store = RecordStore(path, schema, self._key, FIX, self._check)
        self.found: dict[tuple[str, str, int], Record] = {}

    @staticmethod
    def _key(record: Record) -> tuple[str, str, int]:
        return record["split"], record["decoder"], record["index"]

    def _check(self, record: Record) -> None:
        if (cell := self.cells.get((record["split"], record["decoder"]))) is None:
            raise ValueError(f"decoder is {record['decoder']!r:.60}, split {record['split']!r:.60}")
        check_problem(record, cell.problems)

    def records(self, split: str, name: str, most: int) -> list[Record]:
        """The first ``most`` records of a decoder, by index, as far as they are there."""
        return [self.found[split, name, i] for i in range(most) if (split, name, i) in self.found]

    def measure(self, what: str, split: str, names: Sequence[str], size: int) -> list[Standing]:
        """Standings on the first ``size`` problems of a split; what is missing is decoded, each batch written at once."""
        label = f"{what}, {size} problems"
        standings: list[Standing] = []
        for name in names:
            self.progress(label, len(standings), len(names))
            cell = self.cells[split, name]
            todo = [i for i in cell.todo(set()) if i < size and (split, name, i) not in self.found]
            for batch in run_cell(self.prepared, cell, todo, self.config):
                records = [{"split": split, "decoder": name, **{key: r[key] for key in MEASURED}} for r in batch]
                with writing_to(self.store.path.parent):
                    self.store.append(records)
                self.found |= {self._key(r): r for r in records}
            records = self.records(split, name, size)
            points, possible = shares(records, self.metric)
            passes = [r["nfe"] for r in records]
            error = stdev(passes) / len(passes) ** 0.5 if len(passes) > 1 else 0.0
            standings.append(Standing(name, sum(points) / sum(possible), fmean(passes), error))
        self.progress(label, len(names), len(names))
        return standings


def tune(config: TuneConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run or resume a search, and write ``front.json``.

    Args:
        progress: called with (round, decoders measured, decoders in all).

    Returns:
        What ``front.json`` holds; docs/tune.md lists it.

    Raises:
        UserError: for anything wrong in the request, and where ``output`` holds a search with other settings.
    """
    if world_size() > 1:
        raise UserError("a search runs as one process: start it without torchrun or accelerate")
    presets, others = candidates(config.budget, config.max_new_tokens, config.early_stop, config.cfg_scale)
    trials = Trials(config, [*presets, *others], progress)
    output = Path(config.output)
    own = ("budget", "metric", "cfg_scale", "limit", "run_off_limit", "test_limit")
    settings = {**trials.prepared.settings, **{key: getattr(config, key) for key in own}}
    with writing_to(output):
        claim(output, settings)
        trials.found = trials.store.merge()

    decoders = {cell.decoder_spec: cell.decoder for cell in trials.prepared.cells}
    safe = {name for name, d in decoders.items() if d.threshold is None and d.passes <= config.budget}
    seen, unseen = (len(trials.cells[split, presets[0]].problems) for split in ("validation", "test"))
    sizes = round_sizes(min(config.limit, seen))
    finalists: list[Standing] = []
    for what, names, least in (("presets", presets, len(presets)), ("candidates", others, MIN_SURVIVORS)):
        measure = partial(trials.measure, what, "validation")
        finalists += successive_halving(names, sizes, measure, config.budget, least, safe)
    leaders = in_run_off(finalists, presets, safe)
    within = [s for s in ranked(trials.measure("run-off", "validation", leaders, seen)) if s.nfe <= config.budget]
    winner, preset = within[0].name, next(s.name for s in within if s.name in presets)
    trials.measure("test", "test", list(dict.fromkeys((winner, preset))), unseen)

    def entry(split: str, name: str, most: int) -> dict[str, Any]:
        facts = {"decoder": name, "preset": name in presets, "plan": decoders[name].passes}
        return facts | summarize(trials.records(split, name, most))

    (ours, possible), (theirs, _) = (
        shares(trials.records("test", name, unseen), config.metric) for name in (winner, preset)
    )
    difference, interval = paired_difference(ours, theirs, possible)
    test = {"winner": entry("test", winner, unseen), "best_preset": entry("test", preset, unseen)}
    spent = {"validation": 0, "test": 0}
    for (split, *_), record in trials.found.items():
        spent[split] += record["nfe"]
    result = {
        "config": settings,
        "environment": environment(),
        "rounds": sizes,
        "candidates": [entry("validation", name, sizes[-1]) for name in (*presets, *others)],
        "finalists": [s.name for s in finalists],
        "front": [s.name for s in pareto(finalists)],
        "run_off": [entry("validation", name, seen) for name in leaders],
        "winner": entry("validation", winner, seen),
        "best_preset": entry("validation", preset, seen),
        "test": {**test, "difference": difference, "difference_interval": list(interval)},
        "forward_passes": spent,
    }
    with writing_to(output):
        write_json(output / "front.json", result)
    return result
