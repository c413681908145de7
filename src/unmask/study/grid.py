"""A study's file as the list of its jobs: what is trained, what is evaluated, and what tells the cells apart.

A value that is a list where one is expected is an axis; a table's axes are multiplied, and the tables of a list stand beside
each other. What two tables have in common is run once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.config import build, default_of, read_config, with_parameters
from unmask.decoding import Decoder, make_decoder
from unmask.errors import UserError, unknown
from unmask.evaluation.config import EvalConfig
from unmask.io.files import expand_home, slug
from unmask.results.pivot import PLAN, SEEDS, Values, distinct
from unmask.rl.config import DiffusionGRPOConfig
from unmask.study.config import StudyConfig
from unmask.tasks import make_task
from unmask.training.config import MAY_CHANGE

_NAMES = ("name", "decoder", "batch_size")
"""Settings of an evaluation that change no record."""
_CHOSEN_HERE = ("output", "data", "compile", "trajectories")


@dataclass(frozen=True)
class Cell:
    """One evaluation under one decoder: its settings, and its key: a hash of all that decides its records."""

    evaluation: EvalConfig
    decoder: Decoder
    named: Values
    """The settings as the study's file names them, ``decoder`` without what other axes add to it."""
    training: DiffusionGRPOConfig | None
    key: str

    @property
    def source(self) -> str:
        """The model it is about, in so far as settings say it: for all cells of one, the weights must be the same."""
        model = self.evaluation
        return _key(_training_part(self.training), model.model, model.adapter, model.revision)


@dataclass(frozen=True)
class Job:
    """What one process does: train, where there is something to train, then evaluate the cells."""

    name: str
    training: DiffusionGRPOConfig | None
    cells: list[Cell]


def _key(*settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _product(table: Mapping[str, Any], is_axis: Mapping[str, bool]) -> Iterator[Values]:
    """The table with every axis at each of its values. Raises UserError for an axis without values."""
    axes = [k for k in table if is_axis[k]]
    for key in axes:
        if not table[key]:
            raise UserError(f"{key} is an empty list: give at least one value")
    for values in itertools.product(*(table[k] for k in axes)):
        yield {**table, **dict(zip(axes, values, strict=True))}


def _trainings(config: StudyConfig, config_dir: Path) -> list[DiffusionGRPOConfig]:
    hints = {f.name: f.type for f in dataclasses.fields(DiffusionGRPOConfig)}
    found: dict[str, DiffusionGRPOConfig] = {}
    for table in config.train:
        table = dict(table)
        base = table.pop("base", None)
        values = _base(config_dir / expand_home(str(base))) if base is not None else {}
        for key in table:
            if key not in hints or key == "output_dir":
                raise unknown("key in train", key, [h for h in hints if h != "output_dir"])
        takes_list = {k: "list" in str(hints[k]) for k in table}
        axes = {
            k: isinstance(v, list) and (not takes_list[k] or (bool(v) and all(isinstance(e, list) for e in v)))
            for k, v in table.items()
        }
        for settings in _product(table, axes):
            if "tasks" not in {**values, **settings}:
                raise UserError("train lacks tasks: add it, or a base that has it")
            run = build(DiffusionGRPOConfig, {**values, **settings, "output_dir": "none"}, "train")
            run.check_batch()
            found.setdefault(_key(_training_part(run)), run)
    if len(models := {run.model for run in found.values()}) > 1:
        raise UserError(f"train starts from {' and '.join(sorted(map(str, models)))}: make a study of each")
    return list(found.values())


def _base(path: Path) -> Values:
    return dataclasses.asdict(read_config(DiffusionGRPOConfig, path))


def _evaluations(config: StudyConfig) -> list[tuple[EvalConfig, Decoder, Values]]:
    """Every evaluation of one task under one decoder, with the settings that the file names."""
    of_evaluation = {f.name for f in dataclasses.fields(EvalConfig)} - set(_CHOSEN_HERE)
    of_decoder = {f.name for f in dataclasses.fields(Decoder)} - {"name"} - of_evaluation
    found = []
    for table in config.evaluate:
        for key in table:
            if key not in of_evaluation | of_decoder:
                raise unknown("key in evaluate", key, of_evaluation | of_decoder)
        table = {"task": EvalConfig().task, "decoder": EvalConfig().decoder, **table}
        for settings in _product(table, {k: isinstance(v, list) for k, v in table.items()}):
            make_task(str(settings["task"]), {})  # refuses what is none
            extra = {k: v for k, v in settings.items() if k in of_decoder}
            spec = with_parameters(str(settings["decoder"]), **extra)
            values = {k: v for k, v in settings.items() if k in of_evaluation}
            values |= {"task": [str(settings["task"])], "decoder": [spec], "trajectories": True, "output": "none"}
            evaluation = build(EvalConfig, values, "evaluate")
            found.append((evaluation, make_decoder(spec, max_new_tokens=evaluation.max_new_tokens), settings))
    return found


def jobs_of(config: StudyConfig, config_dir: Path) -> list[Job]:
    """The jobs in the order of the file, trainings by seed first: a study cut short has whole seeds.

    Args:
        config_dir: the folder of the study's file, where ``base`` is looked for.

    Raises:
        UserError: for an unknown key or a value that a setting cannot take.
    """
    trainings, evaluations = _trainings(config, config_dir), _evaluations(config)
    if trainings and any("model" in named for _, _, named in evaluations):
        raise UserError("evaluate names a model beside train: the models are those that train makes")
    if trainings and len({evaluation.seed for evaluation, _, _ in evaluations}) > 1:
        raise UserError("evaluate varies the seed beside train: vary the seed of the trainings, on the same problems")
    trainings.sort(key=lambda t: t.seed)  # stable
    jobs: list[Job] = []
    seen: set[str] = set()
    for training in (None, *trainings):
        cells = []
        for evaluation, decoder, named in evaluations:
            if training is not None:
                evaluation = dataclasses.replace(evaluation, model="(trained)")
            elif trainings:
                evaluation = dataclasses.replace(evaluation, model=str(trainings[0].model))
            key = _cell_key(training, evaluation, decoder)
            if key not in seen:
                seen.add(key)
                cells.append(Cell(evaluation, decoder, named, training, key))
        if training is not None:
            label = f"{training.objective}--{training.decoder}--seed{training.seed}"
            jobs.append(Job(slug(f"{label}-{_key(_training_part(training))[:8]}"), training, cells))
        else:
            jobs += [Job(slug(f"{c.evaluation.task[0]}--{c.decoder.name}-{c.key[:8]}"), None, [c]) for c in cells]
    return jobs


def _cell_key(training: DiffusionGRPOConfig | None, evaluation: EvalConfig, decoder: Decoder) -> str:
    """Names do not count: ``full`` and ``full:cfg_scale=0`` are one decoder."""
    evaluated, decoded = (
        {k: v for k, v in _changed(settings).items() if k not in _NAMES} for settings in (evaluation, decoder)
    )
    return _key(_training_part(training), evaluated, decoded)


def _training_part(training: DiffusionGRPOConfig | None) -> Values:
    """The settings of a training that decide what comes out."""
    return {} if training is None else {k: v for k, v in _changed(training).items() if k not in MAY_CHANGE}


def _changed(settings: Any) -> Values:
    """Fields that are not at their defaults: one that is added later leaves what is finished as it is."""
    values = {f.name: (getattr(settings, f.name), default_of(f)) for f in dataclasses.fields(settings)}
    return {name: value for name, (value, default) in values.items() if value != default}


def check_compared(config: StudyConfig, axes: dict[str, list[Any]]) -> None:
    """Raises UserError where a comparison is asked for that there cannot be."""
    vary = [axis for axis, values in axes.items() if len(values) > 1 and axis not in ("task", *SEEDS)]
    for axis in config.compare:
        if axis not in vary:
            raise UserError(f"compare names {axis!r}: choose from what varies, {', '.join(vary) or 'which is nothing'}")
    for decoder in config.baselines:
        if decoder not in axes["decoder"]:
            raise unknown("decoder of baselines", decoder, axes["decoder"])


def labels(jobs: list[Job]) -> tuple[dict[str, Values], dict[str, list[Any]]]:
    """What tells the cells apart, by key, and the axes with their values in the order of the file.

    A setting is an axis where cells of one task differ in it. Task and decoder always are; those of the training have a
    prefix and are None for the model that no training has touched.
    """
    named = {k for job in jobs for c in job.cells for k in c.named} - {"task", *_NAMES}
    tables: dict[str, Values] = {}
    for job in jobs:
        trained = (
            {}
            if job.training is None
            else {k: v for k, v in dataclasses.asdict(job.training).items() if k not in MAY_CHANGE}
        )
        for cell in job.cells:
            table: Values = {"task": cell.evaluation.task[0], "decoder": str(cell.named["decoder"])}
            table |= {
                k: getattr(cell.evaluation if hasattr(cell.evaluation, k) else cell.decoder, k) for k in sorted(named)
            }
            table |= {f"train.{k}": v for k, v in trained.items()}
            tables[cell.key] = table
    keys = list(dict.fromkeys(k for t in tables.values() for k in t))
    axes: dict[str, list[Any]] = {}
    for key in keys:
        values = distinct(t[key] for t in tables.values() if key in t)
        of_task = {(t["task"], json.dumps(t[key])) for t in tables.values() if key in t}
        if len(of_task) > len({task for task, _ in of_task}) or key in ("task", "decoder"):
            axes[key] = values
    if any(job.training for job in jobs):  # what is trained is said also where only one thing is
        for key in ("train.objective", "train.decoder"):
            axes.setdefault(key, [t[key] for t in tables.values() if key in t][:1])
    return {key: {k: t.get(k) for k in axes} for key, t in tables.items()}, axes


def settings_of(jobs: list[Job], tables: dict[str, Values]) -> list[Values]:
    """What tells the cells apart, seeds aside, and the passes of their plans."""
    found = [{**tables[c.key], PLAN: c.decoder.passes} for job in jobs for c in job.cells]
    return distinct({k: v for k, v in table.items() if k not in SEEDS} for table in found)


def training_labels(jobs: list[Job], tables: dict[str, Values]) -> dict[str, Values]:
    """What tells the trainings apart, by the name of their job."""
    trained = {job.name: tables[job.cells[0].key] for job in jobs if job.training}
    return {name: {k: v for k, v in table.items() if k.startswith("train.")} for name, table in trained.items()}
