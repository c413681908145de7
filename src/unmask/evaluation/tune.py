"""``unmask tune``: the best decoder within a budget of forward passes a problem, by successive halving.

Every candidate decodes a few validation problems; the better third goes on to twice as many, and so on; of the presets all
go on. What is over the budget is out. The best of the last round decode still more problems, a run-off; its winner and the
best preset then decode test problems that the search has not seen. Every measurement is a line of ``measurements.jsonl``, so
a killed search goes on where it stopped, and ends the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from unmask.errors import TooFewProblems, UserError
from unmask.evaluation.tune_config import TuneConfig
from unmask.io.files import read_json, read_lines, whole, write_json, writing_to
from unmask.io.schema import CONFIG, MEASURED
from unmask.results.statistics import pareto_front

if TYPE_CHECKING:
    from unmask.evaluation.config import EvalConfig
    from unmask.evaluation.evaluate import Cell, PreparedEvaluation, Progress
    from unmask.evaluation.records import Record

# Heavy imports stand inside the functions, so that --help and a typo answer at once.

FIRST_ROUND = 16
"""Problems of the first round."""
ONE_IN = 3
"""One candidate in so many goes on after a round."""
FINALISTS = 8
"""So many candidates go on at least, as far as they may be within the budget. Of the presets all do."""
NUM_FINALISTS = 6
"""So many go into the run-off, the best preset besides, and the best preset that cannot exceed the budget."""
STDERR_TOLERANCE = 2
"""Before the last round, a mean that is over the budget by no more than so many standard errors may still be within it."""
KEPT = tuple(MEASURED)


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
    return min(standings, key=_merit)


def _merit(standing: Standing) -> tuple[float, float]:
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
    ranked = sorted(finalists, key=_merit)
    known = [s for s in ranked if s.name in presets]
    chosen = [*ranked[:NUM_FINALISTS], known[0], next(s for s in known if s.name in safe)]
    return [s.name for s in ranked if s in chosen]


def decide(run_off: Sequence[Standing], budget: float, presets: Container[str]) -> tuple[str, str]:
    """The winner of a run-off and the best preset; what is over the budget on its problems is out."""
    within = [s for s in run_off if s.nfe <= budget]
    return best(within).name, best([s for s in within if s.name in presets]).name


def round_sizes(last: int) -> list[int]:
    """Problems of each round: 16, 32, 64, … and ``last``."""
    sizes = [last]
    size = FIRST_ROUND
    while size < last:
        sizes.insert(-1, size)
        size *= 2
    return sizes


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


class Measurements:
    """What has been decoded: records by split, decoder and index, and a file of JSON lines, one a finished batch."""

    def __init__(self, path: Path, request: PreparedEvaluation, config: EvalConfig) -> None:
        """Raises UserError where the file is damaged."""
        self.path, self.request, self.config = path, request, config
        self.found: dict[tuple[str, str], dict[int, Record]] = {}
        schema = {"split": str, "decoder": str, "records": [MEASURED]}
        lines = read_lines(path, schema, "remove it, and the search starts again")
        for line in lines:
            self._add(line)
        with whole(path) as partial:  # without what a killed run left of its last line
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _add(self, line: dict[str, Any]) -> None:
        known = self.found.setdefault((line["split"], line["decoder"]), {})
        known |= {record["index"]: record for record in line["records"]}

    def so_far(self, split: str, name: str) -> list[Record]:
        """The records of a decoder, by index."""
        return [record for _, record in sorted(self.found[split, name].items())]

    def records(self, split: str, cell: Cell, size: int) -> list[Record]:
        """The first ``size`` records of a cell; those that are missing are decoded, and each batch becomes a line of the file.

        Raises UserError where the file holds records of other problems.
        """
        from unmask.evaluation.evaluate import run_cell

        known = self.found.setdefault((split, cell.decoder_spec), {})
        ids = dict(enumerate(p.id for p in cell.problems))
        if any(ids.get(index) != record["id"] for index, record in known.items()):
            raise UserError(f"{self.path} holds records of other problems: give another --output")
        todo = [i for i in cell.todo(set(known)) if i < size]
        for batch in run_cell(self.request, cell, todo, self.config) if todo else ():
            records = [{key: record[key] for key in KEPT} for record in batch]
            line = {"split": split, "decoder": cell.decoder_spec, "records": records}
            with writing_to(self.path.parent), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._add(line)
        return [known[i] for i in range(size)]


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


def tune(config: TuneConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run or resume a search, and write its folder.

    Args:
        progress: called with (round, decoders measured, decoders in all).

    Returns:
        What ``front.json`` holds; docs/tune.md lists it.

    Raises:
        UserError: for anything wrong in the request, and where ``output`` holds a search with other settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a search runs as one process: start it without torchrun or accelerate")
    from unmask.evaluation.evaluate import environment, prepare
    from unmask.evaluation.prompts import task_prompts
    from unmask.evaluation.records import summarize
    from unmask.evaluation.tune_space import candidates
    from unmask.results.statistics import paired_difference
    from unmask.tasks import make_task

    make_task(config.task, {})  # a typo is refused before the model is loaded, and so is a folder that cannot be had
    output = Path(config.output)
    _check_folder(output)
    presets, others = candidates(config.budget, config.max_new_tokens, config.early_stop, config.cfg_scale)
    evaluation = config.evaluation([*presets, *others])
    try:
        request = prepare(evaluation)
    except TooFewProblems as error:
        asked = f"--limit {config.limit} and --run-off-limit {config.run_off_limit} ask for the larger number"
        raise UserError(f"{error} ({asked})") from None
    cells = {("validation", cell.decoder_spec): cell for cell in request.cells}
    task, seen = request.cells[0].task, request.cells[0].problems
    unseen = task.problems("test", config.test_limit, config.seed)
    prompts = task_prompts(request.lm, task, unseen)
    request.lm.encode(prompts, config.max_new_tokens)  # refuses now what is too long
    cells |= {("test", c.decoder_spec): replace(c, problems=unseen, prompts=prompts) for c in request.cells}
    mine = ("budget", "metric", "cfg_scale", "limit", "run_off_limit", "test_limit")
    settings = {**request.resolved, **{key: getattr(config, key) for key in mine}}
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        _claim(output / "config.json", json.loads(json.dumps(settings)))
        done = Measurements(output / "measurements.jsonl", request, evaluation)

    decoders = {cell.decoder_spec: cell.decoder for cell in request.cells}
    safe = {name for name, d in decoders.items() if d.threshold is None and d.passes <= config.budget}

    def measure(what: str, split: str, names: Sequence[str], size: int) -> list[Standing]:
        found: list[Standing] = []
        for name in names:
            if progress:
                progress(f"{what}, {size} problems", len(found), len(names))
            found.append(standing(name, done.records(split, cells[split, name], size), config.metric))
        if progress:
            progress(f"{what}, {size} problems", len(names), len(names))
        return found

    sizes = round_sizes(min(config.limit, len(seen)))

    def search(what: str, names: list[str], least: int) -> list[Standing]:
        def of_round(names: Sequence[str], size: int) -> list[Standing]:
            return measure(what, "validation", names, size)

        return successive_halving(names, sizes, of_round, config.budget, least, safe)

    known = search("presets", presets, len(presets))
    finalists = [*known, *search("candidates", others, FINALISTS)]
    leaders = in_run_off(finalists, presets, safe)
    winner, preset = decide(measure("run-off", "validation", leaders, len(seen)), config.budget, presets)
    measure("test", "test", list(dict.fromkeys((winner, preset))), len(unseen))

    def entry(split: str, name: str, most: int | None = None) -> dict[str, Any]:
        facts = {"decoder": name, "preset": name in presets, "plan": decoders[name].passes}
        return facts | summarize(done.so_far(split, name)[:most])

    (ours, possible), (theirs, _) = (shares(done.so_far("test", name), config.metric) for name in (winner, preset))
    difference, interval = paired_difference(ours, theirs, possible)
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
        "test": {
            "winner": entry("test", winner),
            "best_preset": entry("test", preset),
            "difference": difference,
            "difference_interval": list(interval),
        },
        "forward_passes": {
            split: sum(r["nfe"] for (where, name) in done.found if where == split for r in done.so_far(split, name))
            for split in ("validation", "test")
        },
    }
    with writing_to(output):
        write_json(output / "front.json", result)
    return result


def _check_folder(output: Path) -> None:
    """Raises UserError where ``output`` cannot be written or holds measurements of unknown settings; leaves no trace."""
    with writing_to(output):
        there = next(folder for folder in (output, *output.parents) if folder.exists())
        TemporaryDirectory(dir=there).cleanup()
        if (output / "measurements.jsonl").exists() and not (output / "config.json").exists():
            raise UserError(
                f"{output} holds measurements without the config.json they belong to: give another --output"
            )


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Make the folder this search's, or refuse one that belongs to other settings."""
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path, CONFIG, "give another --output")
    if changed := sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k)):
        raise UserError(f"{path.parent} holds a search with other {', '.join(changed)}: give another --output")
