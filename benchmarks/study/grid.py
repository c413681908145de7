"""A study's file as the list of its jobs: what is trained, what is evaluated, and what tells the cells apart.

A value that is a list where one is expected is an axis; a table's axes are multiplied, and the tables of a list
are joined. What two tables have in common is run once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.study import PLAN, SEEDS, Values, distinct
from benchmarks.study.config import StudyConfig
from benchmarks.study.tables import Pivot, pivots
from unmask.config import build, read_config, with_parameters
from unmask.decoding import Decoder, make_decoder
from unmask.decoding.decoder import APPROXIMATE
from unmask.errors import UserError, unknown
from unmask.evaluation.config import EvalConfig
from unmask.io.files import expand_home, slug
from unmask.io.store import FORMAT
from unmask.rl.config import DiffusionGRPOConfig
from unmask.tasks import make_task
from unmask.training.config import MAY_CHANGE

_SET_HERE = ("output", "data", "compile", "trajectories")
_NO_RESULT = ("decoder", "batch_size", *_SET_HERE)
"""Settings of an evaluation that change no record, or are in a cell's key in another form."""


@dataclass(frozen=True)
class Cell:
    """One task under one decoder. ``key`` is a hash of all settings that decide its records, defaults included."""

    evaluation: EvalConfig
    decoder: Decoder
    named: Values
    """The settings as the study's file names them, ``decoder`` without what other axes add to it."""
    training: DiffusionGRPOConfig | None
    run: str
    """A hash of the same without the decoder: cells that share it are one run of ``unmask eval``."""
    job: str
    """The name of the job that makes it."""

    @property
    def key(self) -> str:
        return _key(self.run, _deciding(self.decoder))


@dataclass(frozen=True)
class Job:
    """A training, where there is one, and the cells that are evaluated behind it."""

    name: str
    training: DiffusionGRPOConfig | None
    cells: list[Cell]


@dataclass(frozen=True)
class Grid:
    """The cells of a study in the order of its file, what tells them apart by key, the axes with their values, the tables."""

    cells: list[Cell]
    labels: dict[str, Values]
    axes: dict[str, list[Any]]
    tables: list[Pivot]

    @property
    def jobs(self) -> list[Job]:
        """A job for each training, and for each run of ``unmask eval`` of a model that none makes."""
        found: dict[str, Job] = {}
        for cell in self.cells:
            found.setdefault(cell.job, Job(cell.job, cell.training, [])).cells.append(cell)
        return list(found.values())

    @property
    def trainings(self) -> dict[str, Values]:
        """What tells the trainings apart, by the name of their job."""
        trained = {job.name: self.labels[job.cells[0].key] for job in self.jobs if job.training}
        return {name: {k: v for k, v in own.items() if k.startswith("train.")} for name, own in trained.items()}


def read_grid(config: StudyConfig, config_dir: Path) -> Grid:
    """What a study's file asks for; ``base`` is looked for in ``config_dir``.

    Raises:
        UserError: for an unknown key, a value that a setting cannot take, or a comparison or table that there cannot be.
    """
    cells = _cells(_trainings(config, config_dir), _evaluations(config))
    labels, axes = _labels(cells)
    vary = [axis for axis, values in axes.items() if len(values) > 1 and axis not in ("task", *SEEDS)]
    for axis in config.compare:
        if axis not in vary:
            raise UserError(f"compare names {axis!r}: choose from what varies, {', '.join(vary) or 'which is nothing'}")
    for decoder in config.baselines:
        if decoder not in axes["decoder"]:
            raise unknown("decoder of baselines", decoder, axes["decoder"])
    settings = [{**labels[c.key], PLAN: c.decoder.passes} for c in cells]
    return Grid(cells, labels, axes, pivots(config.tables, settings, config.compare, config.baselines))


def _key(*settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _training_key(training: DiffusionGRPOConfig | None) -> str:
    """A hash of all settings that decide what a training makes, those of its tasks and its decoder included."""
    if training is None:
        return ""
    own = {k: v for k, v in dataclasses.asdict(training).items() if k not in (*MAY_CHANGE, "decoder")}
    return _key(
        FORMAT, own, _deciding(training.rollout_decoder()), [make_task(spec, {}).config() for spec in training.tasks]
    )


_LATER = ("leap_radius", "leap_threshold", "stable", "credit", "entropy_bound", "initial_length")


def _deciding(decoder: Decoder) -> dict[str, Any]:
    """A decoder's settings that decide its tokens: without the name, and an exact cache is like none.

    ``_LATER`` ones count only where they are set, so that the keys of cells made before they were there hold.
    """
    cache = decoder.cache if decoder.cache in APPROXIMATE else "none"
    unset = {k for k in _LATER if getattr(decoder, k) == getattr(Decoder, k)}
    return {k: v for k, v in decoder.config().items() if k != "name" and k not in unset} | {"cache": cache}


def _product(table: Mapping[str, Any], is_axis: Mapping[str, bool]) -> Iterator[Values]:
    """The table with every axis at each of its values. Raises UserError for an axis without values."""
    axes = [k for k in table if is_axis[k]]
    for key in axes:
        if not table[key]:
            raise UserError(f"{key} is an empty list: list at least one value")
    for values in itertools.product(*(table[k] for k in axes)):
        yield {**table, **dict(zip(axes, values, strict=True))}


def _trainings(config: StudyConfig, config_dir: Path) -> list[DiffusionGRPOConfig]:
    """Every training once, by seed, so that a study cut short has whole seeds."""
    hints = {f.name: str(f.type) for f in dataclasses.fields(DiffusionGRPOConfig)}
    found: dict[str, DiffusionGRPOConfig] = {}
    for table in config.train:
        table, values = dict(table), {}
        if (base := table.pop("base", None)) is not None:
            values = dataclasses.asdict(read_config(DiffusionGRPOConfig, config_dir / expand_home(str(base))))
        for key in table:
            if key not in hints or key == "output_dir":
                raise unknown("key in train", key, [h for h in hints if h != "output_dir"])
        lists = {k: v for k, v in table.items() if isinstance(v, list)}
        axes = {
            k: "list" not in hints[k] or (bool(v) and all(isinstance(e, list) for e in v)) for k, v in lists.items()
        }
        for settings in _product(table, dict.fromkeys(table, False) | axes):
            if "tasks" not in {**values, **settings}:
                raise UserError("train lacks tasks: add it, or a base that has it")
            training = build(DiffusionGRPOConfig, {**values, **settings, "output_dir": "none"}, "train")
            training.check_batch()
            found.setdefault(_training_key(training), training)
    if len(models := {training.model for training in found.values()}) > 1:
        raise UserError(f"train starts from {' and '.join(sorted(map(str, models)))}: make a study of each")
    return sorted(found.values(), key=lambda training: training.seed)


def _evaluations(config: StudyConfig) -> list[tuple[EvalConfig, Decoder, Values]]:
    """Every evaluation of one task under one decoder, with the settings that the file names."""
    of_evaluation = {f.name for f in dataclasses.fields(EvalConfig)} - set(_SET_HERE)
    of_decoder = {f.name for f in dataclasses.fields(Decoder)} - {"name"} - of_evaluation
    found = []
    for table in config.evaluate:
        for key in table:
            if key not in of_evaluation | of_decoder:
                raise unknown("key in evaluate", key, of_evaluation | of_decoder)
        table = {"task": EvalConfig().task, "decoder": EvalConfig().decoder, **table}
        for settings in _product(table, {k: isinstance(v, list) for k, v in table.items()}):
            make_task(str(settings["task"]), {})  # refuses what is none
            spec = with_parameters(str(settings["decoder"]), **{k: v for k, v in settings.items() if k in of_decoder})
            values = {k: v for k, v in settings.items() if k in of_evaluation}
            values |= {"task": [str(settings["task"])], "decoder": [spec], "trajectories": True, "output": "none"}
            evaluation = build(EvalConfig, values, "evaluate")
            found.append((evaluation, make_decoder(spec, max_new_tokens=evaluation.max_new_tokens), settings))
    return found


def _cells(trainings: list[DiffusionGRPOConfig], evaluations: list[tuple[EvalConfig, Decoder, Values]]) -> list[Cell]:
    """Every evaluation of the model that no training has touched, then of each trained one."""
    if trainings and any("model" in named for _, _, named in evaluations):
        raise UserError("evaluate names a model beside train: the models are those that train makes")
    if trainings and len({evaluation.seed for evaluation, _, _ in evaluations}) > 1:
        raise UserError("evaluate varies the seed beside train: vary the seed of the trainings, on the same problems")
    found: dict[str, Cell] = {}
    for training in (None, *trainings):
        trained = _training_key(training)
        for evaluation, decoder, named in evaluations:
            if trainings:
                evaluation = replace(evaluation, model="(trained)" if training else str(trainings[0].model))
            settings = {k: v for k, v in dataclasses.asdict(evaluation).items() if k not in _NO_RESULT}
            run = _key(FORMAT, trained, settings, make_task(evaluation.task[0], {}).config())
            job = f"{evaluation.task[0]}--{run[:8]}"
            if training is not None:
                job = f"{training.objective}--{training.decoder}--seed{training.seed}-{trained[:8]}"
            cell = Cell(evaluation, decoder, named, training, run, slug(job))
            found.setdefault(cell.key, cell)
    return list(found.values())


def _labels(cells: list[Cell]) -> tuple[dict[str, Values], dict[str, list[Any]]]:
    """What tells the cells apart, by key, and the axes with their values in the order of the file.

    A setting is an axis where cells of one task differ in it. Task and decoder always are; those of the training have a
    prefix and are None for the model that no training has touched.
    """
    named = sorted({k for cell in cells for k in cell.named} - {"task", "decoder", "name", "batch_size"})
    labels: dict[str, Values] = {}
    for cell in cells:
        own: Values = {"task": cell.evaluation.task[0], "decoder": str(cell.named["decoder"])}
        own |= {k: getattr(cell.evaluation if hasattr(cell.evaluation, k) else cell.decoder, k) for k in named}
        trained = {} if cell.training is None else dataclasses.asdict(cell.training)
        labels[cell.key] = own | {f"train.{k}": v for k, v in trained.items() if k not in MAY_CHANGE}
    axes: dict[str, list[Any]] = {}
    for key in dict.fromkeys(k for own in labels.values() for k in own):
        having = [own for own in labels.values() if key in own]
        of_task = {(own["task"], json.dumps(own[key])) for own in having}
        # What is trained is said also where only one thing is.
        if len(of_task) > len({task for task, _ in of_task}) or key in ("task", "decoder"):
            axes[key] = distinct(own[key] for own in having)
    if any(cell.training for cell in cells):
        for key in ("train.objective", "train.decoder"):
            axes.setdefault(key, [own[key] for own in labels.values() if key in own][:1])
    return {key: {k: own.get(k) for k in axes} for key, own in labels.items()}, axes
