"""The settings of ``unmask eval`` and ``unmask tune``: read without torch, so that help and a typo answer at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from unmask.config import expand_paths
from unmask.errors import UserError, check_at_least, check_own_folder, check_seed
from unmask.models.source import ModelSource


@dataclass(kw_only=True)
class EvalConfig(ModelSource):
    """What to evaluate."""

    task: list[str] = field(default_factory=lambda: ["sudoku", "countdown"])
    """Task specs, e.g. ``sudoku countdown:numbers=4 gsm8k:data=PATH math500``."""
    decoder: list[str] = field(default_factory=lambda: ["full", "semi-ar", "eoser", "ass", "eoser-ass", "hybrid"])
    """Decoder specs, e.g. ``full eoser-ass:blocks=4``, or YAML files."""
    limit: int | None = 256
    """Problems a task (``none``: a whole data file)."""
    split: str = "test"
    """``train``, ``validation``, ``test``; Sudoku also ``heldout`` (grids no training puzzle came from)."""
    shots: int = 0
    """Worked examples in front of every problem, from the training split; for tasks that have worked responses."""
    max_new_tokens: int = 128
    """Canvas length in tokens, unless a decoder sets its own."""
    early_stop: bool = True
    """A row is finished once its text is: all committed up to its first end token. Changes passes, not text."""
    batch_size: int = 32
    """Rows of one forward pass; a finished row makes room for the next problem."""
    seed: int = 0
    """Seed of the problems and of any sampling."""
    compile: bool = False
    """torch.compile the model; all forward passes then have one shape."""
    output: str = "runs/eval"
    """Run folder. A second call with the same settings resumes it or just prints the result."""
    trajectories: bool = False
    """Records also keep every token, the step that committed it and its log-probability; a report draws them."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "shots")
        check_seed(self)
        check_own_folder(self.output)
        if not self.task or not self.decoder:
            raise UserError("task and decoder each need at least one value")


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
    """Validation problems of the run-off of the best; with no more than ``limit`` the last round decides."""
    test_limit: int = 256
    """Test problems for the winner and the best preset."""
    max_new_tokens: int = 128
    """Canvas length in tokens."""
    early_stop: bool = True
    """A row ends once its text is complete, as in ``generate`` and ``eval``; without it after its whole plan, as in ``rl``."""
    batch_size: int = 32
    """Rows of one forward pass."""
    seed: int = 0
    """Seed of the problems, and of decoders in random order."""
    output: str = "runs/tune"
    """Run folder. A second call with the same settings resumes it or just prints the result."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_at_least(self, 1, "budget", "limit", "run_off_limit", "test_limit", "max_new_tokens", "batch_size")
        if not all(0 < scale < float("inf") for scale in self.cfg_scale):
            raise UserError(f"cfg_scale is {self.cfg_scale}: use positive numbers")
        if self.cfg_scale and self.budget < 2:
            raise UserError("budget is 1, but guidance takes 2 passes: choose 2 or more, or leave --cfg-scale out")
        self.evaluation(["full"])  # checks the settings that the two have in common

    def evaluation(self, decoders: list[str]) -> EvalConfig:
        """The same settings for decoding the validation problems."""
        shared = {f.name for f in fields(EvalConfig)} & {f.name for f in fields(self)} - {"task", "limit"}
        settings = {name: getattr(self, name) for name in shared}
        limit = max(self.limit, self.run_off_limit)
        return EvalConfig(**settings, task=[self.task], decoder=decoders, limit=limit, split="validation")
