"""What is to be decoded for the page: a prompt, a problem of a task, or what records of an evaluation hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unmask.config import build
from unmask.decoding import Decoder, make_decoder
from unmask.errors import UserError
from unmask.evaluation.prompts import row_seeds
from unmask.evaluation.records import Record
from unmask.io.files import each_line, expand_home, read_json, slug
from unmask.io.schema import CONFIG, RECORD, Number
from unmask.models.masked_lm import MaskedLM
from unmask.models.source import ModelSource
from unmask.tasks import make_task

if TYPE_CHECKING:
    from unmask.view.config import ViewArguments


@dataclass(frozen=True)
class Job:
    """One decode to make.

    Attributes:
        randomness: ``seeds``, as ``decode`` takes them.
        solved: what is known of a text. recorded: the completion that is to come out again.
    """

    decoder: Decoder
    early_stop: bool
    randomness: dict[str, Any]
    solved: Callable[[str], bool | None] = lambda text: None
    recorded: str | None = None


# The model to load, and what makes of it the prompt and the jobs.
Plan = tuple[ModelSource, Callable[[MaskedLM], tuple[str, list[Job]]]]


def from_flags(a: ViewArguments) -> Plan:
    """A prompt, sampled as ``generate`` does, or a task's problem, as ``eval`` does. Raises UserError."""
    decoders = [make_decoder(spec, max_new_tokens=a.max_new_tokens) for spec in a.decoder]

    def plan(lm: MaskedLM) -> tuple[str, list[Job]]:
        if a.task is None:
            jobs = [Job(d, a.early_stop, {"seeds": torch.Generator().manual_seed(a.seed)}) for d in decoders]
            return lm.chat(a.prompt[0], a.prefill), jobs
        task = make_task(a.task, lm.task_defaults)
        problems = task.problems("test", a.index + 1, a.seed)
        if a.index >= len(problems):
            raise UserError(f"{a.task} has no test problem {a.index}: give --index 0 to {len(problems) - 1}")
        problem, seeds = problems[a.index], _seeds(a.seed, a.index)
        jobs = [Job(d, a.early_stop, seeds, lambda text: task.grade(problem, text).solved) for d in decoders]
        return task.prompt(lm, problem), jobs

    return replace(a, model="tiny" if a.model == "auto" else a.model), plan


def from_records(a: ViewArguments) -> Plan:
    """The records of one problem, to be decoded again by the model that made them.

    Raises:
        UserError: where a file, its run's config.json or a record is missing or damaged, or problems or models differ.
    """
    found = [(path, *_read(Path(expand_home(path)), a.index)) for path in a.prompt]
    first, settings, _, record = found[0]
    for path, others, _, another in found[1:]:
        if (another["id"], another["prompt"]) != (record["id"], record["prompt"]):
            raise UserError(f"{first} and {path} hold different prompts at index {a.index}: give records of one task")
        if others.weights != settings.weights:
            raise UserError(f"{first} and {path} were made by different models: make a page of each")

    def plan(lm: MaskedLM) -> tuple[str, list[Job]]:
        if lm.weights != settings.weights:
            raise UserError(
                f"{first} was made with weights {settings.weights}, but {lm.name} has {lm.weights}: give the evaluated "
                "checkpoint as --model"
            )
        return record["prompt"], [
            Job(decoder, s.early_stop, _seeds(s.seed, a.index), {r["completion"]: r["solved"]}.get, r["completion"])
            for _, s, decoder, r in found
        ]

    return settings.source(a), plan


def _seeds(seed: int, index: int) -> dict[str, Any]:
    """The randomness of a problem in an evaluation."""
    return {"seeds": row_seeds(seed, [index])}


@dataclass(frozen=True)
class Settings:
    """What a run's config.json says of the model and of all its decodes."""

    name: str
    weights: str
    dtype: str
    adapter: str | None
    revision: str | None
    load_in_4bit: bool
    seed: int
    early_stop: bool

    def source(self, a: ViewArguments) -> ModelSource:
        """The evaluated model where the flags name none. Foreign code runs only where they say so."""
        dtype = self.dtype if a.dtype == "auto" else a.dtype
        if a.model != "auto":
            return replace(a, dtype=dtype)
        return replace(
            a,
            dtype=dtype,
            model=self.name.removesuffix(f" + {self.adapter}"),
            adapter=a.adapter or self.adapter,
            revision=a.revision or self.revision,
            load_in_4bit=a.load_in_4bit or self.load_in_4bit,
        )


def _read(path: Path, index: int) -> tuple[Settings, Decoder, Record]:
    """A record, and how it was made."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a records file of unmask eval, RUN/records/TASK--DECODER.jsonl")
    run = path.parent.parent / "config.json"
    if not run.is_file():
        raise UserError(f"{path} is in no run's records: give it as RUN/records/{path.name}, with {run.name} in RUN")
    schema = {**CONFIG, "seed": Number(0, 2**30 - 1, whole=True), "early_stop": bool}
    config = read_json(run, schema, "evaluate again")
    try:
        values = {**config, **config["model"]}
        settings = build(Settings, {f.name: values[f.name] for f in fields(Settings)}, "model")
        specs = {f"{slug(t)}--{slug(d)}.jsonl": d for t in config["tasks"] for d in config["decoders"]}
        decoder = build(Decoder, config["decoders"][specs[path.name]], "decoder")
    except (KeyError, UserError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{run} does not say how {path} was made ({what!s:.200}): evaluate again") from None
    records = {r["index"]: r for r in each_line(path, RECORD, "run its unmask eval command again")}
    if index not in records:
        raise UserError(f"{path} holds no record of problem {index} (it has {len(records)}): give another --index")
    return settings, decoder, records[index]
