"""``unmask tune``: the best decoder within a budget of forward passes a problem, by successive halving.

Every candidate decodes a few validation problems; the better third goes on to twice as many, and so on; of the presets all
go on. What is over the budget is out. The best of the last round decode still more problems, a run-off; its winner and the
best preset then decode test problems that the search has not seen. Every measurement is a line of ``measurements.jsonl``, so
a killed search goes on where it stopped, and ends the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from unmask.errors import TooFewProblems, UserError
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.evaluate import Cell, PreparedEvaluation, environment, prepare, run_cell
from unmask.evaluation.progress import Progress
from unmask.evaluation.prompts import task_prompts
from unmask.evaluation.records import FIX, check_problem, summarize
from unmask.evaluation.tune_config import TuneConfig
from unmask.evaluation.tune_space import candidates
from unmask.io.files import write_json, writing_to
from unmask.io.launcher import world_size
from unmask.io.schema import MEASURED
from unmask.io.store import Record, RecordStore, claim
from unmask.results.statistics import paired_difference, pareto_front
from unmask.tasks import make_task

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


def pareto(standings: Sequence[Standing]) -> list[Standing]:
    """Those that no other reaches with as few passes, by passes; of equals the first."""
    return pareto_front(standings, lambda s: (s.nfe, s.value))


def best(standings: Sequence[Standing]) -> Standing:
    """The largest value; of ties the fewest passes, then the first."""
    return min(standings, key=_rank)


def _rank(standing: Standing) -> tuple[float, float]:
    return -standing.value, standing.nfe


def top_fraction(standings: Sequence[Standing], least: int) -> list[Standing]:
    """One in three of them, rounded up, or ``least``; in their order.

    The Pareto front comes first, then the larger value. Few problems leave many ties: of equal values the front holds the
    cheapest, so here more passes come first.
    """
    front = pareto(standings)
    ranked = sorted(standings, key=lambda s: (s not in front, -s.value, -s.nfe))
    kept = ranked[: max(least, math.ceil(len(standings) / ONE_IN))]
    return [s for s in standings if s in kept]


def in_run_off(finalists: Sequence[Standing], presets: Container[str], safe: Container[str]) -> list[str]:
    """Who decodes more problems, best first.

    Args:
        finalists: standings on the problems of the last round. presets, safe: which names are presets, and which cannot
            exceed the budget; one at least is both.
    """
    ranked = sorted(finalists, key=_rank)
    known = [s for s in ranked if s.name in presets]
    chosen = [*ranked[:NUM_FINALISTS], known[0], next(s for s in known if s.name in safe)]
    return [s.name for s in ranked if s in chosen]


def decide(run_off: Sequence[Standing], budget: float, presets: Container[str]) -> tuple[str, str]:
    """The winner of a run-off and the best preset; what is over the budget on its problems is out."""
    within = [s for s in run_off if s.nfe <= budget]
    return best(within).name, best([s for s in within if s.name in presets]).name


def round_sizes(last: int) -> list[int]:
    """Problems of each round: 16, 32, 64, … and ``last``."""
    sizes = [FIRST_ROUND]
    while sizes[-1] < last:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], last]


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
        going_on = top_fraction(within, least)
        if sure := [s for s in within if s.name in safe]:
            going_on.append(best(sure))
        names = [s.name for s in within if s in going_on]
    return within


# ---- the search on a model -------------------------------------------------------------------------------------------


@dataclass
class Trials:
    """Decoders on validation and test problems: the cells, and the records that there are, both by (split, decoder)."""

    prepared: PreparedEvaluation
    config: EvalConfig
    metric: str
    progress: Progress
    cells: dict[tuple[str, str], Cell]
    store: RecordStore
    found: dict[tuple[str, str], dict[int, Record]]

    def open(self) -> None:
        """Read what an interrupted search has measured. Raises UserError where the file is damaged."""
        self._add(list(self.store.merge().values()))

    def _add(self, records: Sequence[Record]) -> None:
        for r in records:
            self.found[r["split"], r["decoder"]][r["index"]] = r

    def records(self, split: str, name: str, most: int | None = None) -> list[Record]:
        """The (first ``most``) records of a decoder, by index."""
        return [record for _, record in sorted(self.found[split, name].items())][:most]

    def measure(self, what: str, split: str, names: Sequence[str], size: int) -> list[Standing]:
        """Standings on the first ``size`` problems of a split; what is missing is decoded, each batch written at once."""
        standings: list[Standing] = []
        for name in names:
            self.progress(f"{what}, {size} problems", len(standings), len(names))
            cell = self.cells[split, name]
            todo = [i for i in cell.todo(set(self.found[split, name])) if i < size]
            for batch in run_cell(self.prepared, cell, todo, self.config) if todo else ():
                records = [{"split": split, "decoder": name, **{key: r[key] for key in MEASURED}} for r in batch]
                with writing_to(self.store.path.parent):
                    self.store.append(records)
                self._add(records)
            standings.append(standing(name, self.records(split, name, size), self.metric))
        self.progress(f"{what}, {size} problems", len(names), len(names))
        return standings


def standing(name: str, records: Sequence[Record], metric: str) -> Standing:
    """A decoder's standing on some problems."""
    points, possible = shares(records, metric)
    passes = [r["nfe"] for r in records]
    error = stdev(passes) / len(passes) ** 0.5 if len(passes) > 1 else 0.0
    return Standing(name, sum(points) / sum(possible), fmean(passes), error)


def shares(records: Sequence[Record], metric: str) -> tuple[list[float], list[float]]:
    """What each problem adds to the value, and what it could add."""
    if metric == "solved":
        return [float(r["solved"]) for r in records], [1.0] * len(records)
    return [r["points"] for r in records], [r["possible"] for r in records]


def prepare_trials(config: TuneConfig, names: Sequence[str], progress: Progress | None) -> Trials:
    """The model, the problems of both splits and the decoders. Raises UserError for anything wrong in the request."""
    evaluation = config.evaluation([*names])
    try:
        prepared = prepare(evaluation)
    except TooFewProblems as error:
        asked = f"--limit {config.limit} and --run-off-limit {config.run_off_limit} ask for the larger number"
        raise UserError(f"{error} ({asked})") from None
    task = prepared.cells[0].task
    problems = {
        "validation": prepared.cells[0].problems,
        "test": task.problems("test", config.test_limit, config.seed),
    }
    prompts = task_prompts(prepared.lm, task, problems["test"])
    prepared.lm.encode(prompts, config.max_new_tokens)  # refuses now what is too long
    cells = {("validation", c.decoder_spec): c for c in prepared.cells}
    cells |= {("test", c.decoder_spec): replace(c, problems=problems["test"], prompts=prompts) for c in prepared.cells}

    def check(record: Record) -> None:
        if (record["split"], record["decoder"]) not in cells:
            raise ValueError(f"decoder is {record['decoder']!r:.60}, split {record['split']!r:.60}")
        check_problem(record, problems[record["split"]])

    def key(record: Record) -> tuple[str, str, int]:
        return record["split"], record["decoder"], record["index"]

    schema = {"split": str, "decoder": str, **MEASURED}
    store = RecordStore(Path(config.output) / "measurements.jsonl", schema, key, FIX, check)
    quiet: Progress = lambda label, done, total: None  # noqa: E731
    return Trials(prepared, evaluation, config.metric, progress or quiet, cells, store, {place: {} for place in cells})


def tune(config: TuneConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run or resume a search, and write its folder.

    Args:
        progress: called with (round, decoders measured, decoders in all).

    Returns:
        What ``front.json`` holds; docs/tune.md lists it.

    Raises:
        UserError: for anything wrong in the request, and where ``output`` holds a search with other settings.
    """
    if world_size() > 1:
        raise UserError("a search runs as one process: start it without torchrun or accelerate")
    make_task(
        config.task, {}
    )  # a typo is refused before the model is loaded, and so is a folder that cannot be written
    output = Path(config.output)
    with writing_to(output):
        TemporaryDirectory(dir=next(f for f in (output, *output.parents) if f.exists())).cleanup()
    presets, others = candidates(config.budget, config.max_new_tokens, config.early_stop, config.cfg_scale)
    trials = prepare_trials(config, [*presets, *others], progress)
    mine = ("budget", "metric", "cfg_scale", "limit", "run_off_limit", "test_limit")
    settings = json.loads(json.dumps({**trials.prepared.settings, **{key: getattr(config, key) for key in mine}}))
    with writing_to(output):
        claim(output, settings)
        trials.open()

    decoders = {cell.decoder_spec: cell.decoder for cell in trials.prepared.cells}
    safe = {name for name, d in decoders.items() if d.threshold is None and d.passes <= config.budget}
    seen, unseen = (len(trials.cells[split, presets[0]].problems) for split in ("validation", "test"))
    sizes = round_sizes(min(config.limit, seen))

    def halve(what: str, names: list[str], least: int) -> list[Standing]:
        def measure(names: Sequence[str], size: int) -> list[Standing]:
            return trials.measure(what, "validation", names, size)

        return successive_halving(names, sizes, measure, config.budget, least, safe)

    finalists = halve("presets", presets, len(presets)) + halve("candidates", others, MIN_SURVIVORS)
    leaders = in_run_off(finalists, presets, safe)
    winner, preset = decide(trials.measure("run-off", "validation", leaders, seen), config.budget, presets)
    trials.measure("test", "test", list(dict.fromkeys((winner, preset))), unseen)

    def entry(split: str, name: str, most: int | None = None) -> dict[str, Any]:
        facts = {"decoder": name, "preset": name in presets, "plan": decoders[name].passes}
        return facts | summarize(trials.records(split, name, most))

    (ours, possible), (theirs, _) = (shares(trials.records("test", name), config.metric) for name in (winner, preset))
    difference, interval = paired_difference(ours, theirs, possible)
    test = {"winner": entry("test", winner), "best_preset": entry("test", preset)}
    passes = {"validation": 0, "test": 0}
    for (split, _), records in trials.found.items():
        passes[split] += sum(r["nfe"] for r in records.values())
    result = {
        "config": settings,
        "environment": environment(),
        "rounds": sizes,
        "candidates": [entry("validation", name, sizes[-1]) for name in (*presets, *others)],
        "finalists": [s.name for s in finalists],
        "front": [s.name for s in pareto(finalists)],
        "run_off": [entry("validation", name) for name in leaders],
        "winner": entry("validation", winner),
        "best_preset": entry("validation", preset),
        "test": {**test, "difference": difference, "difference_interval": list(interval)},
        "forward_passes": passes,
    }
    with writing_to(output):
        write_json(output / "front.json", result)
    return result
