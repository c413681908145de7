"""Settings of a reinforcement-learning run, in TRL's names where TRL has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from unmask.decoding import Decoder, make_decoder
from unmask.rl.objectives import OBJECTIVES
from unmask.spec import UserError, check_at_least, unknown


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
        return OBJECTIVES[self.objective].recorded and self.old_logprobs == "recorded"

    def rollout_decoder(self) -> Decoder:
        return make_decoder(
            self.decoder, max_new_tokens=self.max_completion_length, temperature=float(self.temperature)
        )


@dataclass
class TrajectoryGRPOConfig(GRPOSettings, TrainingArguments):  # type: ignore[misc]
    """``TrainingArguments`` with the settings above.

    ``per_device_train_batch_size`` counts completions of one update on each process, as in TRL; ``num_generations`` must
    divide it. Gradient accumulation is not needed: ``rows_per_forward`` bounds memory.
    """

    output_dir: str = field(default="runs/rl")
    remove_unused_columns: bool = False
    logging_steps: float = 1  # with more, the updates between would go unreported
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        self.check_batch(self.per_device_train_batch_size)
        if self.gradient_accumulation_steps != 1:
            raise UserError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}: raise per_device_train_batch_size "
                "instead, memory is bounded by rows_per_forward"
            )
        if self.max_steps < 1:
            raise UserError(f"max_steps is {self.max_steps}: give the number of updates")
