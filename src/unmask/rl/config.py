"""Settings of a reinforcement-learning run, in TRL's names where TRL has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from unmask.config import LORA_TARGETS, check_reporters, expand_paths
from unmask.errors import UserError, check_at_least, check_positive, check_seed, unknown

if TYPE_CHECKING:
    from unmask.decoding import Decoder

# Heavy imports stand inside the checks, so that help and a typo answer at once.

MAY_CHANGE = ("output", "eval_every", "save_every", "report_to", "log_completions", "rows_per_forward")
_SCHEDULES = ("constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt")


@dataclass
class GRPOSettings:
    """What the trainer needs to know about sampling and the objective."""

    objective: str = "cj"
    """``cj``, ``one-step``, ``diffu`` or ``coupled``."""
    decoder: str = "eoser-ass"
    """Decoder spec for the rollouts and (greedily) for validation; any preset goes with any objective."""
    max_completion_length: int = 128
    """Canvas length in tokens."""
    temperature: float = 1.0
    """Of the rollouts, unless the decoder sets its own."""
    num_generations: int = 8
    """Completions a prompt, the group."""
    num_iterations: int = 1
    """Updates on each rollout (mu)."""
    old_logprobs: Literal["recorded", "recomputed"] = "recorded"
    """Of ``cj``: the old policy's log-probabilities are those recorded in sampling, or scored anew once a rollout, which gives
    the same up to rounding. The other objectives have to score them anew."""
    epsilon: float = 0.2
    """Clipping range of the ratio."""
    beta: float = 0.0
    """Weight of the KL penalty against the starting policy."""
    scale_rewards: Literal["group", "none"] = "group"
    """``group``: advantages divided by the group's standard deviation; ``none``: only centred (the released code)."""
    reward_weights: list[float] | None = None
    """One weight a reward function; by default 1, or the task's own."""
    normalisation: Literal["step", "token", "batch"] = "step"
    """``step``: mean over a step's tokens, then over steps (the paper). ``token``: mean over a completion's tokens. Both then
    take the mean over completions. ``batch``: mean over all tokens of the process's batch, as the released one-step, diffu and
    coupled code over its micro-batch (TRL's ``loss_type`` bnpo)."""
    mask_after_eos: bool = False
    """Leave tokens after the first end token out of the loss (the paper's code keeps them)."""
    steps_per_update: int | None = None
    """Score only this many steps of each trajectory in each update; ``none`` scores all."""
    step_sampling: Literal["uniform", "entropy"] = "uniform"
    """How these steps are chosen among those that have a scored token."""
    rows_per_forward: int = 32
    """Rows of one forward pass, in sampling and in the update: bounds memory, changes no result."""
    compile: bool = False
    """torch.compile the model; prompts are then padded to one width for the whole run."""
    max_replay_gap: float = 1e-3
    """Largest |recorded - recomputed| log-probability (mean, nats a token) that a float32 ``cj`` update accepts."""
    log_completions: bool = True
    """Write one group of completions of every rollout to ``completions.jsonl`` of the run folder (``unmask rl``)."""

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        from unmask.rl.objectives import OBJECTIVES

        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        check_at_least(self, 2, "num_generations")
        check_at_least(self, 1, "num_iterations", "rows_per_forward", "max_completion_length")
        if self.steps_per_update is not None and self.steps_per_update < 1:
            raise UserError(f"steps_per_update is {self.steps_per_update}: give 1 or more, or none for all steps")
        if self.steps_per_update is not None and self.objective != "cj":
            raise UserError(
                f"steps_per_update samples steps of a trajectory: it needs objective cj, not {self.objective}"
            )
        if not 0 < self.epsilon < float("inf") or not 0 <= self.beta < float("inf"):
            raise UserError(
                f"epsilon={self.epsilon}, beta={self.beta}: give a positive epsilon and a beta of 0 or more"
            )
        if not self.max_replay_gap > 0:
            raise UserError(f"max_replay_gap is {self.max_replay_gap}: give a positive number")
        if self.rollout_decoder().max_new_tokens != self.max_completion_length:
            raise UserError(
                f"max_completion_length is {self.max_completion_length}, but decoder {self.decoder} has a canvas of "
                f"{self.rollout_decoder().max_new_tokens} tokens: give the same, or leave it out of the decoder"
            )
        if self.rollout_decoder().cache != "none":
            raise UserError(
                f"cache={self.rollout_decoder().cache} samples from an approximation of the policy: leave it out of the decoder"
            )
        if self.rollout_decoder().top_p < 1:
            raise UserError(
                f"top_p={self.rollout_decoder().top_p} samples from a cut distribution, not from the policy: set top_p=1 in "
                f"the decoder {self.decoder}"
            )
        if self.compile and self.rollout_decoder().threshold is not None:
            raise UserError(
                "compile needs batches of one shape, and under a threshold rows leave at different times: switch it off"
            )
        if self.rollout_decoder().temperature == 0:
            raise UserError("temperature is 0, so all completions of a group are equal: give a temperature above 0")

    def check_batch(self, completions: int) -> None:
        """Raises UserError where the groups do not fill a process's ``completions`` of an update."""
        if completions % self.num_generations:
            raise UserError(
                f"num_generations={self.num_generations} does not divide the batch of {completions} completions a process: "
                "change one of them"
            )

    @property
    def uses_recorded(self) -> bool:
        """Whether the old policy's log-probabilities are the recorded ones."""
        from unmask.rl.objectives import OBJECTIVES

        return OBJECTIVES[self.objective].recorded and self.old_logprobs == "recorded"

    def rollout_decoder(self) -> Decoder:
        from unmask.decoding import make_decoder

        return make_decoder(
            self.decoder, max_new_tokens=self.max_completion_length, temperature=float(self.temperature)
        )


@dataclass(kw_only=True)
class RLConfig(GRPOSettings):
    """One reinforcement-learning run."""

    output: str
    """The run folder: config.yaml, metrics.jsonl, completions.jsonl, checkpoints, TensorBoard files, ``final``."""
    tasks: list[str]
    """Task specs whose problems are the prompts, in equal shares, e.g. ``sudoku countdown``."""
    model: str = "tiny"
    """A shipped model's name, a hub name, or the folder of a checkpoint or adapter (which is merged)."""
    dtype: str = "float32"
    """Dtype of the weights: ``float32``, for adapters also ``bfloat16`` (an adapter's own stay float32) or ``auto``."""
    reward: list[str] = field(default_factory=list)
    """Reward functions ``package.module:function`` instead of the tasks' own; ``released`` stands for those that the released
    trainer pays the tasks by (docs/grading.md)."""
    lora_r: int | None = None
    """Rank of a low-rank adapter (LoRA, arXiv 2106.09685) to train; ``none`` trains all weights."""
    lora_alpha: int = 32
    lora_target_modules: str = LORA_TARGETS
    """Regular expression over module names; by default every matrix of every block."""
    problems: int | None = 5000
    """Training problems a task; ``none`` takes all of a finite training split."""
    validation_problems: int = 64
    """Validation problems a task."""
    steps: int = 100
    """Updates."""
    batch_size: int = 64
    """Completions of one update on each process; ``num_generations`` must divide it."""
    learning_rate: float = 3e-6
    warmup_steps: int = 0
    lr_scheduler: str = "constant_with_warmup"
    """``constant_with_warmup``, ``linear``, ``cosine``, ``polynomial`` or ``inverse_sqrt``."""
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    max_grad_norm: float = 0.2
    bf16: bool = True
    """Autocast sampling and updates to bfloat16 (log-softmax stays float32, and so do weights of dtype float32)."""
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    """``sdpa`` or ``eager`` (faster backward on CPUs)."""
    seed: int = 0
    eval_every: int = 20
    """Updates between validations; one more is made before the first update."""
    save_every: int = 20
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        expand_paths(self)
        self.check()
        if not self.tasks:
            raise UserError("tasks needs at least one entry")
        gym = "reasoning_gym:"  # whose tasks are told apart by their data sets
        names = [spec.partition("," if spec.startswith(gym) else ":")[0] for spec in self.tasks]
        if len(set(names)) < len(names):
            raise UserError(f"tasks {self.tasks} names a task twice, and their figures would mix: make it two runs")
        if self.attention not in ("sdpa", "eager"):
            raise UserError(f"attention is {self.attention!r}: give sdpa or eager")
        if self.lr_scheduler not in _SCHEDULES:
            raise unknown("lr_scheduler", self.lr_scheduler, _SCHEDULES)
        if self.warmup_steps < 0 or not 0 <= self.weight_decay < 1 or not 0 <= self.adam_beta2 < 1:
            raise UserError(
                f"warmup_steps={self.warmup_steps}, weight_decay={self.weight_decay}, adam_beta2={self.adam_beta2}: "
                "give 0 or more, and below 1 for the last two"
            )
        check_reporters(self.report_to)
        check_seed(self)
        if self.lora_r is not None and self.lora_r < 1:
            raise UserError(f"lora_r is {self.lora_r}: give a rank of 1 or more, or none to train all weights")
        if self.problems is not None and self.problems < 1:
            raise UserError(f"problems is {self.problems}: give 1 or more, or none for all of a finite split")
        counts = ("validation_problems", "steps", "batch_size", "eval_every", "save_every", "lora_alpha")
        check_at_least(self, 1, *counts)
        check_positive(self, "learning_rate", "max_grad_norm")
