"""The trainer's arguments: transformers' with the settings of GRPO."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from unmask.errors import UserError
from unmask.rl.config import GRPOSettings


@dataclass
class DiffusionGRPOConfig(GRPOSettings, TrainingArguments):  # type: ignore[misc]
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
