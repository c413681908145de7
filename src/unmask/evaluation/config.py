"""What to evaluate, as the flags of ``unmask eval``: read without torch, so that help and a typo answer at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from unmask.config import expand_paths, with_parameters
from unmask.errors import UserError, check_at_least, check_own_folder, check_seed
from unmask.models.source import ModelSource


@dataclass(kw_only=True)
class EvalConfig(ModelSource):
    """What to evaluate."""

    task: list[str] = field(default_factory=lambda: ["sudoku", "countdown"])
    """Task specs, e.g. ``sudoku countdown:numbers=4 gsm8k math500``."""
    data: str | None = None
    """A file of test problems for the only task: the same as ``--task NAME:data=PATH``."""
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
    """Run folder. A second call with the same settings goes on or just prints the result."""
    trajectories: bool = False
    """Records also keep every token, the step that committed it and its log-probability; ``unmask report`` draws them."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "shots")
        check_seed(self)
        check_own_folder(self.output)
        if not self.task or not self.decoder:
            raise UserError("task and decoder each need at least one value")
        self.task_specs()

    def task_specs(self) -> list[str]:
        """The tasks with ``data`` in its place. Raises UserError where it cannot be."""
        if self.data is None:
            return self.task
        if len(self.task) > 1:
            many = f"data is {self.data!r} for {len(self.task)} tasks"
            raise UserError(f"{many}: choose one --task, or use --task NAME:data=PATH")
        if not self.data.strip() or "," in self.data:
            raise UserError(f"data is {self.data!r}: use the path of a file, without a comma")
        return [with_parameters(self.task[0], data=self.data)]
