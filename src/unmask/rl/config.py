"""Settings of a reinforcement-learning run, in TRL's names where TRL has them; read without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from unmask.errors import UserError, check_at_least, check_positive, check_seed
from unmask.training.config import RunConfig

if TYPE_CHECKING:
    from unmask.decoding import Decoder

# Heavy imports are inside the checks, so that help and a typo answer at once.


@dataclass(kw_only=True)
class DiffusionGRPOConfig(RunConfig):
    """One reinforcement-learning run."""

    command: ClassVar[str] = "rl"

    objective: str = "cj"
    """``cj``, ``one-step``, ``diffu``, ``coupled``, or one of your own as ``package.module:name``."""
    decoder: str = "eoser-ass"
    """Decoder spec for the rollouts and (greedily) for validation; any preset goes with any objective."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions instead of the tasks' own: ``solved``, one of your own as ``package.module:name``, or ``released`` for
    those that the released trainer pays the tasks by (docs/grading.md)."""
    reward_weights: list[float] | None = None
    """One weight a reward function; by default 1, or the task's own."""
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
    """``group``: advantages divided by the group's standard deviation; ``none``: only centered (the released code)."""
    normalization: Literal["step", "token", "batch"] = "step"
    """``step``: mean over a step's tokens, then over steps (the paper). ``token``: mean over a completion's tokens. Both then
    take the mean over completions. ``batch``: mean over all tokens of the process's batch, as the released one-step, diffu and
    coupled code over its micro-batch (TRL's ``loss_type`` bnpo)."""
    mask_after_eos: bool = False
    """Leave tokens after the first end token out of the loss (the paper's code keeps them)."""
    steps_per_update: int | None = None
    """Score only this many steps of each trajectory in each update, drawn anew each time; ``none`` scores all."""
    rows_per_forward: int = 32
    """Rows of one forward pass, in sampling and in the update: bounds memory, changes no result."""
    max_logprob_mismatch: float = 1e-3
    """Largest |recorded - recomputed| log-probability (mean, nats a token) that a float32 ``cj`` update accepts."""
    log_completions: bool = True
    """Write one group of completions of every rollout to ``completions.jsonl`` of the run folder."""

    model: str | None = "tiny"
    """A shipped model's name, a hub name, or the folder of a checkpoint or adapter (which is merged)."""
    problems: int | None = 5000
    """Training problems a task; ``none`` takes all of a finite training split."""
    validation_problems: int = 64
    max_steps: int = 100
    """Updates."""
    per_device_train_batch_size: int = 64
    """Completions of one update on each process; ``num_generations`` must divide it."""
    learning_rate: float = 3e-6
    warmup_steps: int = 0
    """Updates in which the learning rate rises."""
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = "constant_with_warmup"
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    max_grad_norm: float = 0.2
    eval_steps: int = 20
    """Updates between validations; one more is made before the first update."""
    save_steps: int = 20

    def __post_init__(self) -> None:
        from unmask.rl.objectives import find_objective

        super().__post_init__()
        find_objective(self.objective)
        # reasoning-gym's tasks are told apart by their data sets
        names = [spec.partition("," if spec.startswith("reasoning_gym:") else ":")[0] for spec in self.tasks]
        if len(set(names)) < len(names):
            raise UserError(f"tasks {self.tasks} names a task twice, and their figures would mix: make it two runs")
        check_seed(self)
        check_at_least(self, 2, "num_generations")
        counts = ("num_iterations", "rows_per_forward", "max_completion_length")
        check_at_least(self, 1, *counts, *self.chosen("steps_per_update", "problems"))
        if (accumulated := self.trainer_args.get("gradient_accumulation_steps", 1)) != 1:
            raise UserError(
                f"gradient_accumulation_steps is {accumulated}: raise per_device_train_batch_size instead, memory is bounded "
                "by rows_per_forward"
            )
        check_positive(self, "epsilon", "max_logprob_mismatch")
        if self.steps_per_update is not None and self.objective != "cj":
            raise UserError(
                f"steps_per_update samples a trajectory's steps: it needs objective cj, not {self.objective}"
            )
        if not 0 <= self.beta < float("inf"):
            raise UserError(f"beta is {self.beta}: choose 0 or more")
        decoder = self.rollout_decoder()
        if decoder.max_new_tokens != self.max_completion_length:
            raise UserError(
                f"max_completion_length is {self.max_completion_length}, but decoder {self.decoder} has a canvas of "
                f"{decoder.max_new_tokens} tokens: set both alike, or leave it out of the decoder"
            )
        together = self.compile and decoder.threshold is not None
        for message, wrong in {
            f"cache={decoder.cache} samples from an approximation of the policy: leave it out": decoder.cache != "none",
            f"top_p={decoder.top_p} samples from a cut distribution, not the policy: set top_p=1": decoder.top_p < 1,
            "temperature is 0, so all completions of a group are equal: set it above 0": decoder.temperature == 0,
            "compile needs batches of one shape, and under a threshold rows leave early: switch it off": together,
        }.items():
            if wrong:
                raise UserError(f"decoder {self.decoder}: {message}")

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

    def rollout_decoder(self) -> Decoder:
        from unmask.decoding import make_decoder

        return make_decoder(self.decoder, max_new_tokens=self.max_completion_length, temperature=self.temperature)
