"""``unmask tune``: the best decoder within a budget of forward passes a problem, by successive halving.

Rounds of more and more validation problems for fewer and fewer candidates, a run-off, then test problems for its winner and the
best preset. Every measurement is a line of ``measurements.jsonl``, so a killed search resumes and ends the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, takewhile
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

from unmask.decoding import Decoder
from unmask.errors import TooFewProblems, UserError
from unmask.evaluation.config import TuneConfig
from unmask.evaluation.evaluate import environment, prepare, run_cell, task_prompts
from unmask.evaluation.progress import Progress
from unmask.evaluation.records import FIX, check_problem, summarize
from unmask.evaluation.tune_space import candidates
from unmask.io.files import as_yaml, write_json, write_text, writing_to
from unmask.io.launcher import world_size
from unmask.io.schema import MEASURED
from unmask.io.store import Record, RecordStore, claim
from unmask.io.terminal import console
from unmask.results.statistics import paired_difference, pareto_front
from unmask.results.tables import Table, percent, points

Result = dict[str, Any]
FIRST_ROUND = 16  # problems; every further round has twice as many
ONE_IN = 3  # candidates that continue after a round
MIN_SURVIVORS = 8  # candidates that continue at least, as far as they may be within the budget; of the presets all do
NUM_FINALISTS = 6  # in the run-off, besides the best preset and the best preset that cannot exceed the budget
STDERR_TOLERANCE = 2  # standard errors by which a mean may be over the budget before the last round


# ---- the search, without a model -------------------------------------------------------------------------------------


class Standing(NamedTuple):
    """What a decoder has achieved: ``value`` in [0, 1], its mean number of forward passes and that mean's standard error."""

    name: str
    value: float
    nfe: float
    error: float = 0.0


def pareto(standings: Sequence[Standing]) -> list[Standing]:
    return pareto_front(standings, attrgetter("nfe", "value"))


def ranked(standings: Sequence[Standing]) -> list[Standing]:
    """By value; of ties the fewest passes, then the first."""
    return sorted(standings, key=lambda s: (-s.value, s.nfe))


def top_fraction(standings: Sequence[Standing], least: int) -> list[Standing]:
    """One in three of them, rounded up, or ``least``, in their order: the Pareto front first, then the larger values.

    Few problems leave many ties: of equal values the front holds the cheapest, so here more passes come first.
    """
    front = pareto(standings)
    by_value = sorted(standings, key=lambda s: (s not in front, -s.value, -s.nfe))
    kept = by_value[: max(least, math.ceil(len(standings) / ONE_IN))]
    return [s for s in standings if s in kept]


def in_run_off(finalists: Sequence[Standing], presets: Container[str], safe: Container[str]) -> list[str]:
    """Names of those that decode more problems, best first. ``presets``, ``safe``: names; one finalist at least is both."""
    order = ranked(finalists)
    known = [s for s in order if s.name in presets]
    chosen = [*order[:NUM_FINALISTS], known[0], next(s for s in known if s.name in safe)]
    return [s.name for s in order if s in chosen]


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
        least: how many continue at least, as far as they may be within the budget.
        safe: names of those that cannot exceed the budget. The best of them continues too, so that there is a result.
    """
    within: list[Standing] = []
    for size in sizes:
        slack = STDERR_TOLERANCE if size < sizes[-1] else 0
        within = [s for s in measure(names, size) if s.nfe - slack * s.error <= budget]
        kept = [*top_fraction(within, least), *[s for s in ranked(within) if s.name in safe][:1]]
        names = [s.name for s in within if s in kept]
    return within


# ---- the search on a model -------------------------------------------------------------------------------------------


class Trials:
    """Decoders on validation and test problems: ``cells`` and last measured ``entries`` by (split, decoder), ``found`` records
    by (split, decoder, index). Raises UserError for anything wrong in the request."""

    def __init__(
        self, config: TuneConfig, presets: list[str], others: Sequence[str] = (), progress: Progress | None = None
    ) -> None:
        self.presets, self.metric, self.progress = presets, config.metric, progress or (lambda *_: None)
        try:
            self.prepared = prepare(config.evaluation([*presets, *others]))
        except TooFewProblems as error:
            raise UserError(f"{error} (the larger of --limit and --run-off-limit)") from None
        cells, lm = self.prepared.cells, self.prepared.lm
        unseen = cells[0].task.problems("test", config.test_limit, config.seed)
        prompts = task_prompts(lm, cells[0].task, unseen)
        lm.encode(prompts, config.max_new_tokens)  # refuses now what is too long
        self.cells = {("validation", c.decoder_spec): c for c in cells}
        self.cells |= {("test", c.decoder_spec): replace(c, problems=unseen, prompts=prompts) for c in cells}
        path, schema = Path(config.output) / "measurements.jsonl", {"split": str, "decoder": str, **MEASURED}
        self.store = RecordStore(path, schema, itemgetter("split", "decoder", "index"), FIX, self._check)
        self.found: dict[tuple[str, str, int], Record] = {}
        self.entries: dict[tuple[str, str], Result] = {}

    def _check(self, record: Record) -> None:
        if (cell := self.cells.get((record["split"], record["decoder"]))) is None:
            raise ValueError(f"decoder is {record['decoder']!r:.60}, split {record['split']!r:.60}")
        check_problem(record, cell.problems)

    def measure(self, what: str, split: str, names: Sequence[str], size: int) -> list[Standing]:
        """Standings on the first ``size`` problems of a split; what is missing is decoded, each batch written at once."""
        label = f"{what}, {size} problems"
        standings: list[Standing] = []
        for name in names:
            self.progress(label, len(standings), len(names))
            cell = self.cells[split, name]
            todo = [i for i in cell.todo(set()) if i < size and (split, name, i) not in self.found]
            for batch in run_cell(self.prepared, cell, todo):
                records = [{"split": split, "decoder": name, **{key: r[key] for key in MEASURED}} for r in batch]
                with writing_to(self.store.path.parent):
                    self.store.append(records)
                self.found |= {self.store.key(r): r for r in records}
            records = [self.found[split, name, i] for i in range(size)]
            entry: Result = {"decoder": name, "preset": name in self.presets, "plan": cell.decoder.passes}
            self.entries[split, name] = entry = entry | summarize(records)
            error = stdev(r["nfe"] for r in records) / size**0.5 if size > 1 else 0.0
            standings.append(Standing(name, entry[self.metric], entry["nfe"], error))
        self.progress(label, len(names), len(names))
        return standings


def tune(config: TuneConfig, progress: Progress | None = None) -> Result:
    """Run or resume a search; returns what it writes as ``front.json``, which docs/tune.md lists.

    Args:
        progress: called with (round, decoders measured, decoders in all).

    Raises:
        UserError: for anything wrong in the request, and where ``output`` holds a search with other settings.
    """
    if world_size() > 1:
        raise UserError("a search runs as one process: start it without torchrun or accelerate")
    presets, others = candidates(config.budget, config.max_new_tokens, config.early_stop, config.cfg_scale)
    trials, output, budget = Trials(config, presets, others, progress), Path(config.output), config.budget
    own = ("budget", "metric", "cfg_scale", "limit", "run_off_limit", "test_limit")
    settings = {**trials.prepared.settings, **{key: getattr(config, key) for key in own}}
    with writing_to(output):
        claim(output, settings)
        trials.found = trials.store.merge()

    decoders = {cell.decoder_spec: cell.decoder for cell in trials.prepared.cells}
    safe = {name for name, d in decoders.items() if not d.adaptive and d.passes <= budget}
    seen, unseen = (len(trials.cells[split, presets[0]].problems) for split in ("validation", "test"))
    last = min(config.limit, seen)
    sizes = [*takewhile(lambda size: size < last, (FIRST_ROUND * 2**i for i in count())), last]
    finalists: list[Standing] = []
    for what, names, least in (("presets", presets, len(presets)), ("candidates", others, MIN_SURVIVORS)):
        finalists += successive_halving(names, sizes, partial(trials.measure, what, "validation"), budget, least, safe)
    measured = list(trials.entries.values())
    leaders = in_run_off(finalists, presets, safe)
    within = [s for s in ranked(trials.measure("run-off", "validation", leaders, seen)) if s.nfe <= budget]
    sides = {"winner": within[0].name, "best_preset": next(s.name for s in within if s.name in presets)}
    trials.measure("test", "test", list(dict.fromkeys(sides.values())), unseen)
    ours, theirs = ([trials.found["test", name, i] for i in range(unseen)] for name in sides.values())
    gained = "solved" if config.metric == "solved" else "points"
    possible = [1.0 if config.metric == "solved" else r["possible"] for r in ours]
    difference, interval = paired_difference([r[gained] for r in ours], [r[gained] for r in theirs], possible)
    spent = {"validation": 0, "test": 0}
    for (split, *_), record in trials.found.items():
        spent[split] += record["nfe"]
    result = {
        "config": settings,
        "environment": environment(),
        "rounds": sizes,
        "candidates": measured,
        "finalists": [s.name for s in finalists],
        "front": [s.name for s in pareto(finalists)],
        "run_off": [trials.entries["validation", name] for name in leaders],
        **{side: trials.entries["validation", name] for side, name in sides.items()},
        "test": {
            **{side: trials.entries["test", name] for side, name in sides.items()},
            "difference": difference,
            "difference_interval": list(interval),
        },
        "forward_passes": spent,
    }
    with writing_to(output):
        write_json(output / "front.json", result)
    return result


# ---- what a search leaves --------------------------------------------------------------------------------------------


def report(result: Result, output: Path) -> None:
    """Write ``front.md`` and ``decoder.yaml``, the winner under the advice; print the table, the advice and where they are."""
    settings, said, defaults = result["config"], advice(result), Decoder().config()
    title = f"{settings['model']['name']}, {next(iter(settings['tasks']))}: decoders within {settings['budget']} passes"
    headings = ["decoder", "plan", "NFE", "solved % [95 %]", "score % [95 %]", "problems", "what it is"]
    table = Table(headings, rows(result), title=f"{title} a problem, validation split")
    winner = settings["decoders"][result["winner"]["decoder"]]
    defaults["cache"] = winner["cache"]  # what ``auto`` means for this model
    chosen = {k: v for k, v in winner.items() if k in ("name", "max_new_tokens") or v != defaults[k]}
    comment = "".join(f"# {json.dumps(line)[1:-1]}\n" for line in (table.title, *said))  # a name may hold anything
    text = "\n".join(said) + "\n"
    with writing_to(output):
        write_text(output / "front.md", f"{table.title}\n\n{table.markdown()}\n{text}")
        write_text(output / "decoder.yaml", comment + as_yaml(chosen))
    screen, lines = console(), (len(result["front"]) - 1, len(table.rows) - len(result["run_off"]) - 1)
    screen.print(table.for_terminal(screen, ["problems", "score % [95 %]"], lines))
    print(f"{text}front    {output / 'front.md'}\ndecoder  {output / 'decoder.yaml'}")


def rows(result: Result) -> list[list[str]]:
    """The front by passes, the presets that are not on it with the problems that each came to, and the run-off."""
    found = {entry["decoder"]: entry for entry in result["candidates"]}
    presets = [entry for entry in found.values() if entry["preset"] and entry["decoder"] not in result["front"]]
    presets.sort(key=lambda e: (-e["problems"], e["nfe"]))
    decided = sorted(result["run_off"], key=lambda e: -e[result["config"]["metric"]])

    def row(entry: Result, *sides: str) -> list[str]:
        what = [side.replace("_", " ") for side in sides if entry["decoder"] == result[side]["decoder"]]
        what = what or ["preset"] * entry["preset"]
        what += ["over the budget"] * (entry["nfe"] > result["config"]["budget"])
        measured = [percent(entry[key], entry[f"{key}_interval"]) for key in ("solved", "score")]
        facts = [entry["decoder"], str(entry["plan"]), f"{entry['nfe']:.1f}"]
        return [*facts, *measured, str(entry["problems"]), ", ".join(what)]

    first = [row(entry) for entry in (*(found[name] for name in result["front"]), *presets)]
    return first + [row(entry, "winner", "best_preset") for entry in decided]


def advice(result: Result) -> list[str]:
    """What was done, what came out on unseen problems, and which decoder to take."""
    metric, test, passes = result["config"]["metric"], result["test"], result["forward_passes"]
    winner, preset, budget = test["winner"], test["best_preset"], result["config"]["budget"]
    lines = [
        f"{len(result['candidates'])} decoders, rounds of {', '.join(map(str, result['rounds']))} validation problems, "
        f"a run-off of {len(result['run_off'])} on {result['winner']['problems']}: "
        f"{passes['validation']:,} forward passes, and {passes['test']:,} on test."
    ]
    for name, entry in (("winner", winner), ("best preset", preset)):
        share = percent(entry[metric], entry[f"{metric}_interval"])
        measured = f"{metric} {share} % of {entry['problems']} unseen test problems, {entry['nfe']:.1f} passes each"
        lines.append(f"{name} {entry['decoder']}: {measured}.")
    if winner["decoder"] == preset["decoder"]:
        taken, why = winner, "No candidate was better than this preset on validation."
    else:
        low, high = test["difference_interval"]
        taken, side = (winner, "winner") if test["difference"] > 0 else (preset, "preset")
        why = f"winner - best preset, paired: {points(test['difference'], (low, high))} points: "
        why += f"the {side} is {'not clearly ' * (low <= 0 <= high)}better."
    lines.append(f"{why} Take {taken['decoder']}.")
    if taken["nfe"] > budget:
        lines.append(f"On test it takes {taken['nfe']:g} passes a problem, more than the budget of {budget}.")
    return lines
