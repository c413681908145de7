"""Distillation along trajectories: the student follows its own plan, is given a teacher's tokens, and learns them there.

Teachers are decodes of many passes that the grader says are right: records of ``unmask eval --split train --trajectories``.
Related: T3D (arXiv 2602.12262), DiDi-Instruct (2509.25035).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from unmask.decoding import Decoder
from unmask.decoding.canvas import Canvases
from unmask.decoding.loop import DecodingLoop
from unmask.decoding.sampling import TOKEN, Candidates, uniform_noise
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.io.files import each_line, read_json
from unmask.io.schema import CONFIG, COUNT, RECORD, Number, check_same_length
from unmask.models.masked_lm import MaskedLM
from unmask.rl.config import DistillConfig
from unmask.rl.data import Data, task_data
from unmask.rl.objectives import View, ViewRows
from unmask.rl.rewards import Row, score
from unmask.rl.rollout import encode_chunks, rollout_seeds, score_rows
from unmask.rl.run_log import RunLog
from unmask.rl.trajectory_trainer import TrajectoryTrainer, trajectory_arguments
from unmask.tasks import Problem, Task, make_task
from unmask.training.run_folder import run
from unmask.training.trainer import Model, prepare_model

TEACHER = {
    **RECORD,
    "task": str,
    "truth": dict,
    "tokens": [COUNT],
    "steps": [Number(-1, whole=True)],
    "logprobs": [Number()],
}
"""A line of the records that a teacher leaves."""
CERTAINTY = 1 - 1e-6  # bound of a teacher's probability, from below too: what a record rounds to 1 or 0 is neither


@dataclass(frozen=True)
class Teacher:
    """What a batch learns, (B, L) each: ``tokens`` (int64, filled with EOS after the text's first end token), the ``steps`` in
    which the teacher committed them, and their ``logprobs`` there, in nats (0 in the filling)."""

    tokens: Tensor
    steps: Tensor
    logprobs: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Teacher:
        return cls(
            *(torch.tensor([row["teacher"][key] for row in rows]).to(device) for key in ("tokens", "steps", "logprobs"))
        )


class GuidedLoop(DecodingLoop):
    """A decode whose committed tokens are the teacher's; which positions are committed is the student's choice.

    Args:
        teacher: of the rows that are decoded, by their numbers. own_tokens: share of the steps in which the student's own
            tokens are kept. teacher_order: commit what the teacher committed first, as much of it as the plan says.
    """

    def __init__(
        self, lm: MaskedLM, decoder: Decoder, teacher: Teacher, own_tokens: float = 0.0, teacher_order: bool = False
    ) -> None:
        super().__init__(lm, decoder, early_stop=False)
        self.teacher, self.own_tokens, self.teacher_order = teacher, own_tokens, teacher_order
        # commits in which the student would have chosen the same, and all
        self.agreed = torch.zeros(2, device=lm.device)

    def advance(self, rows: Canvases) -> None:
        self.number = torch.tensor(rows.numbers, device=rows.ids.device)
        super().advance(rows)

    def _of_teacher(self, values: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        return values[self.number[at[0]], at[1]]

    def score(self, rows: Canvases, at: tuple[Tensor, Tensor], found: Candidates, gammas: Tensor) -> Tensor:
        if not self.teacher_order:
            return super().score(rows, at, found, gammas)
        step = self._of_teacher(self.teacher.steps, at).double()
        return self._of_teacher(self.teacher.logprobs, at).double().exp() - step  # of one step, the surest first

    def commit(self, rows: Canvases, at: tuple[Tensor, Tensor], found: Candidates, chosen: Tensor) -> None:
        row, column = at
        tokens = self._of_teacher(self.teacher.tokens, at)
        self.agreed += torch.stack([(chosen & (tokens == found.tokens)).sum(), chosen.sum()])
        if self.own_tokens:
            own = uniform_noise(rows.seeds[row] + 1, rows.at[row], torch.zeros_like(column), TOKEN) < self.own_tokens
            tokens = torch.where(own, found.tokens, tokens)
        super().commit(rows, at, replace(found, tokens=tokens), chosen)


def student_trajectory(
    lm: MaskedLM, prompts: Sequence[str], loop: GuidedLoop, seeds: Tensor, rows_per_forward: int, widest: int = 0
) -> Trajectory:
    """The guided decode of prompts, at most ``rows_per_forward`` rows at a time, in their order. widest: see ``padded_width``.

    ``logprob`` is that of the student's own candidates.
    """
    length, parts = loop.decoder.plan.length, []
    for chunk, ids, mask in encode_chunks(lm, prompts, length, rows_per_forward, widest):
        blank = torch.full((len(ids), length), lm.mask_id, device=ids.device)
        numbers = range(len(prompts))[chunk]
        parts += list(loop.run(Canvases.new(ids, mask, blank, lm.mask_id, seeds[chunk].to(ids.device), numbers)))
    order = torch.tensor([number for part in parts for number in part.numbers]).argsort()
    return Trajectory.cat([part.trajectory(lm.mask_id, loop.decoder.config()) for part in parts]).take(order)


def state_views(trajectory: Trajectory, masked_weight: float) -> tuple[list[View], list[Tensor]]:
    """Every state of a trajectory with all that is masked in it, and each position's weight (B, L) float32 in the loss.

    What the step commits weighs 1, what stays masked ``masked_weight``; over all states the weights of a row sum to 1.
    """
    views, weights = [], []
    for s in range(trajectory.steps):
        committed, later = trajectory.committed(s), trajectory.step > s
        scored = committed | later if masked_weight else committed
        views.append(View(torch.cat([trajectory.prompt, trajectory.state(s)], 1), scored))
        weights.append(committed + masked_weight * later)
    total = torch.stack(weights).sum((0, 2))[:, None]
    return views, [weight / total for weight in weights]


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -student


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p = teacher.exp().clamp(1 - CERTAINTY, CERTAINTY)
    return p * (p.log() - student) + (1 - p) * ((1 - p).log() - _rest(student))


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = teacher.exp().clamp(1 - CERTAINTY, CERTAINTY), student.exp()
    return q * (student - p.log()) + (1 - q) * (_rest(student) - (1 - p).log())


def _rest(logprob: Tensor) -> Tensor:
    """log(1 - p) of all other tokens together."""
    return (-logprob.clamp(max=-1e-7).expm1()).log()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": cross_entropy,
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
}
"""Of the log-probabilities (N,) of the teacher's tokens, the student's and the teacher's. The divergences are those of two
outcomes, the teacher's token or any other: what a record tells of the teacher's distribution in its own state."""


def read_teacher(lm: MaskedLM, config: DistillConfig, data: Data) -> list[Row]:
    """The decodes to learn from, as rows with ``prompt``, ``problem``, ``task`` and ``teacher`` (``Teacher``'s lists).

    Kept are those that are solved, or where ``min_reward`` is set, whose reward is that or more.

    Raises:
        UserError: for a folder that is no finished evaluation of training problems, or of other tasks, another tokenizer or
            another canvas, or where none of a task is kept.
    """
    tasks, rows, records = {task.label: task for task in data.tasks}, [], []
    for name, record in (found for folder in config.teacher_folders for found in _records_of(Path(folder), tasks)):
        _check_tokens(lm, record, config.max_completion_length)
        problem = Problem(record["id"], record["prompt"], record["truth"])
        rows.append({"prompt": record["prompt"], "problem": problem, "task": tasks[name]})
        records.append(record)
    kept = [record["solved"] for record in records]
    if config.min_reward is not None and rows:
        table = score(data.reward_funcs, rows, [record["completion"] for record in records])
        kept = (table.total(data.weights) >= config.min_reward).tolist()
    for name, task in tasks.items():
        own = [keep for row, keep in zip(rows, kept, strict=True) if row["task"] == task]
        if not any(own):
            what = "is solved" if config.min_reward is None else f"has a reward of {config.min_reward:g} or more"
            raise UserError(f"none of the teacher's {len(own)} decodes of task {name} {what}: choose a better teacher")
    every = zip(rows, records, kept, strict=True)
    return [{**row, "teacher": _filled(lm, record)} for row, record, keep in every if keep]


def _records_of(folder: Path, tasks: Mapping[str, Task]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of a finished evaluation of training problems of ``tasks``, with the label of its task."""
    fix = "make it with unmask eval --split train --trajectories"
    settings = read_json(folder / "config.json", {**CONFIG, "split": str, "shots": COUNT}, fix)
    if settings["split"] != "train" or settings["shots"]:
        what = f"decoded {settings['split']} problems with {settings['shots']} worked examples"
        raise UserError(f"the teacher {folder} {what}: {fix}, without examples")
    if not (folder / "summary.json").is_file() or next((folder / "records").glob("*.rank-*"), None):
        raise UserError(f"the teacher {folder} is an unfinished evaluation: give its command again")
    labels = {spec: make_task(spec, {}).label for spec in settings["tasks"]}
    for spec, own in settings["tasks"].items():
        if labels[spec] not in tasks:
            raise UserError(f"the teacher {folder} decoded task {labels[spec]}, which is not trained: add it to tasks")
        here = json.loads(json.dumps(tasks[labels[spec]].config()))
        if differing := [key for key in {**own, **here} if own.get(key) != here.get(key)]:
            asked = f"{differing[0]}={own.get(differing[0])}, this run {here.get(differing[0])}"
            raise UserError(f"the teacher {folder} decoded task {labels[spec]} with {asked}: set both alike")
    for path in sorted((folder / "records").glob("*.jsonl")):
        for record in each_line(path, TEACHER, fix, _equally_long):
            yield labels[record["task"]], record


def _equally_long(record: dict[str, Any]) -> dict[str, Any]:
    check_same_length(record, "tokens", "steps", "logprobs")
    return record


def _check_tokens(lm: MaskedLM, record: dict[str, Any], length: int) -> None:
    """Raises UserError where a record has another canvas, or tokens that do not mean its text."""
    tokens = record["tokens"]
    if len(tokens) != length:
        canvas = f"the teacher has a canvas of {len(tokens)} tokens, this run of {length}"
        raise UserError(f"{canvas}: set max_completion_length alike")
    vocabulary = len(lm.model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if max(tokens) >= vocabulary or lm.text(torch.tensor([tokens])) != [record["completion"]]:
        other = f"the teacher has another tokenizer than {lm.name}: its tokens are not its text"
        raise UserError(f"{other}; choose a teacher of the same family")


def _filled(lm: MaskedLM, record: dict[str, Any]) -> dict[str, list[Any]]:
    """Tokens, steps and log-probabilities of a record, with EOS after the first end token, as committed last."""
    tokens, steps, logprobs = (list(record[key]) for key in ("tokens", "steps", "logprobs"))
    end = int(lm.lengths(torch.tensor([tokens]))) + 1
    rest = len(tokens) - min(end, len(tokens))
    for values, fill in ((tokens, lm.eos_id), (steps, len(tokens)), (logprobs, 0.0)):
        values[len(values) - rest :] = [fill] * rest
    return {"tokens": tokens, "steps": steps, "logprobs": logprobs}


class DistillTrainer(TrajectoryTrainer):
    """Trains a model to write a teacher's tokens in the states in which its own decoder puts it.

    Args:
        model: a MaskedLM, a name or path that ``load`` takes, or a PreTrainedModel with ``processing_class``.
        args: the settings; its ``teacher`` are folders of ``unmask eval --split train --trajectories``, whose tasks are the
            run's (decoders that it may name are for the command, which decodes first).
    """

    config: DistillConfig

    def __init__(
        self,
        model: Model,
        args: DistillConfig,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        arguments = trajectory_arguments(args)
        lm = prepare_model(model, args, processing_class)
        self.config = replace(args, model=lm.name)
        with arguments.main_process_first():  # one process fetches a data set, the others find it
            data = task_data(lm, args)
        data.training = read_teacher(lm, args, data)
        self.prompts = arguments.per_device_train_batch_size
        super().__init__(lm, arguments, data, callbacks)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Decode under guidance, then accumulate the gradient over the states. Returns the loss."""
        config, start, step = self.config, time.perf_counter(), self.state.global_step
        seeds, _ = rollout_seeds(config.seed, step, self.args.process_index * len(inputs), len(inputs))
        with self.inference() as student:
            teacher = Teacher.of(inputs, student.device)
            loop = GuidedLoop(student, self.decoder, teacher, config.own_tokens, config.order == "teacher")
            prompts = [row["prompt"] for row in inputs]
            trajectory = student_trajectory(student, prompts, loop, seeds, config.rows_per_forward, self.widest)
        decoded = time.perf_counter()
        views, weights = state_views(trajectory.by_block(self.lm.block_length), config.masked_weight)
        rows, weight = ViewRows.of(views), torch.cat(weights) / len(inputs)
        total, student = torch.zeros((), device=weight.device), replace(self.lm, model=model)
        loss_of = LOSSES[config.loss]
        for part, counted in self.forward_passes(model, self.microbatches(rows)):
            taken = rows.take(part)
            logprob, _, at, row, column = score_rows(student, trajectory, taken, teacher.tokens, self.widest)
            losses = loss_of(logprob, teacher.logprobs[row, column])
            loss = (weight[part][at, column] * counted * losses).sum()
            total = total + loss.detach()
            self.accelerator.backward(loss)
        self.check_finite(total)
        same, nfe = self._mean([float(loop.agreed[0] / loop.agreed[1]), float(trajectory.nfe.double().mean())])
        self.pending_metrics |= {"agreement": same, "nfe": nfe}
        times = {"seconds_rollout": decoded - start, "seconds_update": time.perf_counter() - decoded}
        self.pending_metrics |= times
        return total


def train(config: DistillConfig) -> Path:
    """Run, or resume from the run folder's newest checkpoint; returns the folder of the final plain checkpoint."""
    trainer = DistillTrainer(str(config.model), config)
    trainer.add_callback(RunLog(trainer))
    return run(trainer)
