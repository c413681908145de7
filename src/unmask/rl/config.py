"""Settings of reinforcement learning and distillation, in TRL's names where TRL has them; read without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from unmask.errors import UserError, check_at_least, check_positive, check_seed
from unmask.training.config import RunConfig

if TYPE_CHECKING:
    from unmask.decoding import Decoder

# Heavy imports are inside the checks, so that help and a typo answer at once.


@dataclass(kw_only=True)
class TrajectoryConfig(RunConfig):
    """What every training along a decoder's trajectories takes."""

    decoder: str = "eoser-ass"
    """Decoder spec for the trajectories and (greedily) for validation; any preset will do."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions instead of the tasks' own: ``solved``, one of your own as ``package.module:name``, ``task`` for the
    tasks' own beside others, or ``released`` for those that the released trainer pays the tasks by (docs/grading.md)."""
    reward_weights: list[float] | None = None
    """One weight a reward function; by default 1, or the task's own."""
    max_completion_length: int = 128
    """Canvas length in tokens."""
    temperature: float = 1.0
    """Of the trajectories, unless the decoder sets its own."""
    rows_per_forward: int = 32
    """Rows of one forward pass, in decoding and in the update: bounds memory, changes no result."""

    model: str | None = "tiny"
    """A shipped model's name, a hub name, or the folder of a checkpoint or adapter (which is merged)."""
    problems: int | None = 5000
    """Training problems a task; ``none`` takes all of a finite training split."""
    validation_problems: int = 64
    max_steps: int = 100
    """Updates."""
    learning_rate: float = 3e-6
    warmup_steps: int = 0
    """Updates in which the learning rate rises."""
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = "constant_with_warmup"
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    eval_steps: int = 20
    """Updates between validations; one more is made before the first update."""
    save_steps: int = 20
    load_best_model_at_end: bool = False
    """Keep the checkpoint of the best validation (mean reward) beside the last ones; ``final`` is the best then. The model that
    the run starts from is none of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # reasoning-gym's tasks are told apart by their data sets
        names = [spec.partition("," if spec.startswith("reasoning_gym:") else ":")[0] for spec in self.tasks]
        if len(set(names)) < len(names):
            raise UserError(f"tasks {self.tasks} names a task twice, and their figures would mix: make it two runs")
        check_seed(self)
        check_at_least(self, 1, "rows_per_forward", "max_completion_length", *self.chosen("problems"))
        if (accumulated := self.trainer_args.get("gradient_accumulation_steps", 1)) != 1:
            raise UserError(
                f"gradient_accumulation_steps is {accumulated}: raise per_device_train_batch_size instead, memory is bounded "
                "by rows_per_forward"
            )
        if "load_best_model_at_end" in self.trainer_args:
            raise UserError("trainer_args sets load_best_model_at_end: set it among the run's own settings")
        if self.load_best_model_at_end and self.save_steps != self.eval_steps:
            raise UserError(
                f"load_best_model_at_end keeps what was validated, but eval_steps is {self.eval_steps} and save_steps "
                f"{self.save_steps}: set both alike"
            )
        from unmask.decoding.decoder import APPROXIMATE

        decoder = self.rollout_decoder()
        if decoder.max_new_tokens != self.max_completion_length:
            raise UserError(
                f"max_completion_length is {self.max_completion_length}, but decoder {self.decoder} has a canvas of "
                f"{decoder.max_new_tokens} tokens: set both alike, or leave it out of the decoder"
            )
        together = self.compile and decoder.adaptive
        for message, wrong in {
            f"cache={decoder.cache} samples from an approximation of the policy: leave it out": decoder.cache
            in APPROXIMATE,
            "its canvas changes length, and an update sees one length: leave initial_length out": bool(
                decoder.initial_length
            ),
            "compile needs batches of one shape, and under a threshold rows leave early: switch it off": together,
            **self.unfit(decoder),
        }.items():
            if wrong:
                raise UserError(f"decoder {self.decoder}: {message}")

    def unfit(self, decoder: Decoder) -> dict[str, bool]:
        """What else may be wrong with the decoder, and whether it is."""
        return {}

    def rollout_decoder(self) -> Decoder:
        from unmask.decoding import make_decoder

        return make_decoder(self.decoder, max_new_tokens=self.max_completion_length, temperature=self.temperature)


@dataclass(kw_only=True)
class DiffusionGRPOConfig(TrajectoryConfig):
    """One reinforcement-learning run."""

    command: ClassVar[str] = "rl"

    objective: str = "cj"
    """Spec of an objective: ``cj``, ``one-step``, ``espo:draws=4``, … (docs/rl.md), or one of your own as
    ``package.module:name``."""
    pairs: str | None = None
    """For objective ``vrpo``, which samples nothing: rows of ``prompt``, ``chosen`` and ``rejected`` (text or messages), a hub
    data set or a local file."""
    num_generations: int = 8
    """Completions a prompt, the group."""
    max_resamples: int = 0
    """How often groups whose rewards are all equal are replaced by other prompts (dynamic sampling, DAPO, arXiv 2503.14476);
    the metric ``samples_per_completion`` says what it costs."""
    num_iterations: int = 1
    """Updates on each rollout (mu)."""
    old_logprobs: Literal["recorded", "recomputed"] = "recorded"
    """Of ``cj`` and its kin: the old policy's log-probabilities are those recorded in sampling, or scored anew once a rollout,
    which gives the same up to rounding. The other objectives have to score them anew."""
    epsilon: float = 0.2
    """Clipping range of the ratio."""
    beta: float = 0.0
    """Weight of the KL penalty against the starting policy."""
    scale_rewards: Literal["group", "none"] = "group"
    """``group``: advantages divided by the group's standard deviation; ``none``: only centered (the released code)."""
    loss_type: Literal["step", "grpo", "bnpo", "dr_grpo"] = "step"
    """``step``: mean over a step's tokens, then over steps (the paper). The others are TRL's: ``grpo``, mean over a
    completion's tokens; ``dr_grpo``, their sum divided by the canvas length (these three then take the mean over completions);
    ``bnpo``, mean over all tokens of the process's batch, as released one-step, diffu and coupled code over its micro-batch."""
    mask_after_eos: bool = False
    """Leave tokens after the first end token out of the loss (the paper's code keeps them)."""
    max_logprob_mismatch: float = 1e-3
    """Largest |recorded - recomputed| log-probability (mean, nats a token) that a float32 update of ``cj`` or kin accepts."""
    log_completions: bool = True
    """Write one group of completions of every rollout to ``completions.jsonl`` of the run folder."""

    per_device_train_batch_size: int = 64
    """Completions of one update on each process; ``num_generations`` must divide it."""
    max_grad_norm: float = 0.2

    def __post_init__(self) -> None:
        from unmask.rl.objectives import find_objective

        super().__post_init__()
        objective = find_objective(self.objective)
        check_at_least(self, 2, "num_generations")
        check_at_least(self, 1, "num_iterations")
        check_at_least(self, 0, "max_resamples")
        check_positive(self, "epsilon", "max_logprob_mismatch")
        if not 0 <= self.beta < float("inf"):
            raise UserError(f"beta is {self.beta}: choose 0 or more")
        if objective.pairs is (self.pairs is None):
            wrong = "needs pairs: name their file" if objective.pairs else "samples its completions: leave pairs out"
            raise UserError(f"objective {self.objective} {wrong}")
        for name, wanted, fine in (
            ("num_generations", "2, the chosen and the rejected", self.num_generations == 2),
            ("num_iterations", "1", self.num_iterations == 1),
            ("beta", "above 0, the weight of what the policy gains", self.beta > 0),
        ):
            if objective.pairs and not fine:
                raise UserError(f"{name} is {getattr(self, name)}: with pairs choose {wanted}")
        if self.beta and objective.reads == "policy":
            raise UserError(f"beta is {self.beta}, but objective {self.objective} compares no policies: set it to 0")

    def unfit(self, decoder: Decoder) -> dict[str, bool]:
        from unmask.rl.objectives import find_objective

        unfit = find_objective(self.objective).unfit(decoder)
        return {
            **({} if unfit is None else {unfit: True}),
            f"top_p={decoder.top_p} samples from a cut distribution, not the policy: set top_p=1": decoder.top_p < 1,
            "temperature is 0, so all completions of a group are equal: set it above 0": decoder.temperature == 0,
        }

    def check_batch(self) -> None:
        """Raises UserError where groups do not fill a process's completions of an update."""
        if self.per_device_train_batch_size % self.num_generations:
            raise UserError(
                f"num_generations={self.num_generations} does not divide the batch of {self.per_device_train_batch_size} "
                "completions a process: change one of them"
            )

    @property
    def uses_recorded(self) -> bool:
        """Whether the old policy's log-probabilities are the recorded ones."""
        from unmask.rl.objectives import find_objective

        return find_objective(self.objective).recorded and self.old_logprobs == "recorded"


@dataclass(kw_only=True)
class DistillConfig(TrajectoryConfig):
    """One distillation into fewer passes."""

    command: ClassVar[str] = "distill"

    teacher: list[str] = field(default_factory=lambda: ["full"])
    """Decoders, under each of which the model itself decodes the training problems once; or folders of ``unmask eval --split
    train --trajectories``, of this model or one with its tokenizer."""
    tasks: list[str] = field(default_factory=list)
    """Task specs, those that the teacher decodes; each has the share that its right decodes have."""
    problems: int | None = 5000
    """Training problems a task that the model itself decodes; ``none`` takes all of a finite training split."""
    min_reward: float | None = None
    """Learn from decodes with this reward or more; by default from those that the task's grader calls solved."""
    order: Literal["student", "teacher"] = "student"
    """Whose order of commits the states follow; the student's plan says how many in either case."""
    own_tokens: float = 0.0
    """Share of the steps in which the student's own tokens stay, right or wrong; the teacher's are learned there too."""
    loss: Literal["cross-entropy", "forward-kl", "reverse-kl"] = "cross-entropy"
    """``cross-entropy`` on the teacher's tokens, or the divergence from the teacher's probability of them in its own state."""
    masked_weight: float = 0.3
    """Weight in the loss of tokens that a state leaves masked, beside 1 for those that it commits."""

    temperature: float = 0.0
    """Of the student's candidates, unless the decoder sets its own."""
    per_device_train_batch_size: int = 32
    """Texts of one update on each process."""
    learning_rate: float = 3e-4
    warmup_steps: int = 20
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise UserError("tasks is empty: choose those that the teacher decodes")
        if not self.teacher:
            raise UserError("teacher is empty: choose a decoder, or a folder of unmask eval")
        folders = [name for name in self.teacher if (Path(name) / "config.json").is_file()]
        paths = [name for name in self.teacher if "/" in name and not name.endswith((".yaml", ".yml"))]
        if missing := next((name for name in paths if name not in folders), None):
            raise UserError(
                f"the teacher {missing} is no folder of an evaluation: make it with unmask eval --split train --trajectories "
                f"--output {missing}, or name a decoder"
            )
        if folders and folders != self.teacher:
            raise UserError(f"teacher {self.teacher} mixes folders and decoders: choose one kind")
        for name in ("own_tokens", "masked_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: choose 0 to 1")

    @property
    def teacher_folders(self) -> list[str]:
        """The folders of ``teacher``, or the one of the run folder for decodes under the decoders that it names."""
        there = (Path(self.teacher[0]) / "config.json").is_file()
        return self.teacher if there else [str(Path(self.output_dir) / "teacher")]

    def unfit(self, decoder: Decoder) -> dict[str, bool]:
        by_score = self.order == "teacher" and decoder.threshold is not None
        return {"its threshold is for scores, and order=teacher has none: set order=student": by_score}
