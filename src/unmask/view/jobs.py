"""The decodes of a page: of a prompt, of a problem of a task, or of what an evaluation recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.config import build
from unmask.decoding import Decoder, make_decoder
from unmask.errors import UserError
from unmask.evaluation.evaluate import problem_seeds
from unmask.io.files import each_line, expand_home, read_json, slug
from unmask.io.schema import CONFIG, RECORD
from unmask.io.store import Record
from unmask.models.masked_lm import MaskedLM
from unmask.models.source import ModelSource
from unmask.tasks import make_task
from unmask.tasks.base import grade_completion
from unmask.view.config import ViewArguments


@dataclass(frozen=True)
class Job:
    """One decode to make: ``seeds`` (1,) int64, ``solved`` grades a text, ``recorded`` is the completion that it repeats."""

    decoder: Decoder
    early_stop: bool
    seeds: Tensor
    solved: Callable[[str], bool | None] = lambda text: None
    recorded: str | None = None


Prepared = tuple[
    ModelSource, Callable[[MaskedLM], tuple[str, list[Job]]]
]  # a model, and what makes prompt and jobs with it


def from_flags(a: ViewArguments) -> Prepared:
    """A prompt, sampled as ``generate`` does, or a task's problem, as ``eval`` does. Raises UserError."""
    decoders = [make_decoder(spec, max_new_tokens=a.max_new_tokens) for spec in a.decoder]

    def make_jobs(lm: MaskedLM) -> tuple[str, list[Job]]:
        if a.task is None:
            return lm.chat(a.prompt[0], a.prefill), [Job(d, a.early_stop, torch.tensor([a.seed])) for d in decoders]
        task = make_task(a.task, lm.task_defaults)
        problems = task.problems("test", a.index + 1, a.seed)
        if a.index >= len(problems):
            raise UserError(f"{a.task} has no test problem {a.index}: choose --index 0 to {len(problems) - 1}")
        problem, seeds = problems[a.index], problem_seeds(a.seed, [a.index])
        jobs = [
            Job(d, a.early_stop, seeds, lambda text: grade_completion(task, problem, text).solved) for d in decoders
        ]
        return task.prompt(lm, problem), jobs

    return replace(a, model="tiny" if a.model == "auto" else a.model), make_jobs


def from_records(a: ViewArguments) -> Prepared:
    """The records of one problem, to be decoded again by the model that made them. Raises UserError where they cannot be."""
    found = [(path, *_read(Path(expand_home(path)), a.index)) for path in a.prompt]
    first, config, _, record = found[0]
    for path, _, _, other in found[1:]:
        if (other["id"], other["prompt"]) != (record["id"], record["prompt"]):
            raise UserError(f"{first} and {path} hold different prompts at index {a.index}: use records of one task")

    def make_jobs(lm: MaskedLM) -> tuple[str, list[Job]]:
        jobs = []
        for path, own, decoder, r in found:
            if lm.weights != (weights := own["model"]["weights"]):
                made = f"{path} was made with weights {weights}, but {lm.name} has {lm.weights}"
                raise UserError(f"{made}: choose the evaluated checkpoint as --model, and records of one model")
            seeds, solved = problem_seeds(own["seed"], [a.index]), {r["completion"]: r["solved"]}.get
            jobs.append(Job(decoder, own["early_stop"], seeds, solved, r["completion"]))
        return record["prompt"], jobs

    return source_of(config, a), make_jobs


def source_of(config: dict[str, Any], a: ViewArguments) -> ModelSource:
    """The evaluated model where the flags name none. Foreign code runs only where they say so."""
    own: dict[str, Any] = {"dtype": config["model"]["dtype"] if a.dtype == "auto" else a.dtype}
    if a.model == "auto":
        own |= {key: getattr(a, key) or config[key] for key in ("adapter", "revision", "load_in_4bit")}
        own["model"] = config["model"]["name"].removesuffix(f" + {config['adapter']}")
    return replace(a, **own)


def _read(path: Path, index: int) -> tuple[dict[str, Any], Decoder, Record]:
    """The settings of a record's run, its decoder, and the record."""
    run = path.parent.parent / "config.json"
    if not (path.is_file() and run.is_file()):
        raise UserError(f"{path} is in no run's records: use RUN/records/TASK--DECODER.jsonl, with {run.name} in RUN")
    config = read_json(run, CONFIG, "evaluate again")
    specs = {f"{slug(t)}--{slug(d)}.jsonl": d for t in config["tasks"] for d in config["decoders"]}
    try:
        decoder = build(Decoder, config["decoders"][specs[path.name]], "decoder")
    except (KeyError, UserError) as error:
        raise UserError(f"{run} does not say how {path} was made ({error!s:.200}): evaluate again") from None
    records = {r["index"]: r for r in each_line(path, RECORD, "run its unmask eval command again")}
    if index not in records:
        raise UserError(f"{path} holds no record of problem {index} (it has {len(records)}): choose another --index")
    return config, decoder, records[index]
