"""What ``unmask tune`` is asked: read without torch, so that help and a typo answer at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from unmask.config import expand_paths
from unmask.errors import UserError, check_at_least
from unmask.evaluation.config import EvalConfig
from unmask.models.source import ModelSource


@dataclass(kw_only=True)
class TuneConfig(ModelSource):
    """Search for the decoder that is best on a task within a budget of forward passes."""

    task: str
    """Task spec, e.g. ``countdown`` or ``gsm8k:data=FOLDER``; it needs validation and test problems."""
    budget: int
    """Forward passes a problem, as a mean over the validation problems; guidance counts double."""
    metric: Literal["solved", "score"] = "solved"
    """What is best: the share of problems solved, or of points (Sudoku: cells)."""
    cfg_scale: list[float] = field(default_factory=list)
    """Strengths of guidance to try beside none, e.g. ``0.5 1``."""
    limit: int = 128
    """Validation problems of the last round; the first has 16."""
    run_off_limit: int = 384
    """Validation problems on which the best meet in a run-off; with no more than ``limit`` the last round decides."""
    test_limit: int = 256
    """Test problems for the winner and the best preset."""
    max_new_tokens: int = 128
    """Canvas length in tokens."""
    early_stop: bool = True
    """A row ends once its text is complete, as in ``generate`` and ``eval``. Without it a row takes its whole plan, as in the
    rollouts of ``rl``."""
    batch_size: int = 32
    """Rows of one forward pass."""
    seed: int = 0
    """Seed of the problems, and of decoders in random order."""
    output: str = "runs/tune"
    """Run folder. A second call with the same settings goes on or just prints the result."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_at_least(self, 1, "budget", "limit", "run_off_limit", "test_limit", "max_new_tokens", "batch_size")
        for scale in self.cfg_scale:
            if not 0 < scale < float("inf"):
                raise UserError(f"cfg_scale is {scale}: use positive numbers")
        if self.cfg_scale and self.budget < 2:
            raise UserError(
                "budget is 1, and guidance takes 2 passes at least: choose a budget of 2 or more, or leave --cfg-scale out"
            )
        self.evaluation(["full"])  # checks the settings that the two have in common

    def evaluation(self, decoders: list[str]) -> EvalConfig:
        """The same settings for decoding the validation problems."""
        mine = {f.name for f in fields(self)} - {"task"}
        shared = {f.name: getattr(self, f.name) for f in fields(EvalConfig) if f.name in mine}
        shared["limit"] = max(self.limit, self.run_off_limit)
        return EvalConfig(**shared, task=[self.task], decoder=decoders, split="validation")
