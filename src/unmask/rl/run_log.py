"""What a training along trajectories writes into its run folder beside checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from unmask.io.files import read_lines, write_text
from unmask.io.schema import COUNT
from unmask.rl.trajectory_trainer import TrajectoryTrainer

_TIMES = ("seconds_rollout", "seconds_update")


class RunLog(TrainerCallback):
    """metrics.jsonl, times.jsonl and completions.jsonl of a run folder; a resumed run first drops what came after its start.

    Times have a file of their own: everything else is the same, to the bit, in a resumed run.
    """

    def __init__(self, trainer: TrajectoryTrainer) -> None:
        self.trainer, self.folder = trainer, Path(trainer.config.output_dir)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for name in ("metrics", "times", "completions"):
            path = self.folder / f"{name}.jsonl"
            if not path.exists():
                continue
            # The validation before the first update belongs to step 0 of a fresh start only.
            lines = read_lines(path, {"step": COUNT}, "remove it, and the run resumes without what it held")
            kept = [e for e in lines if e["step"] <= state.global_step] if state.global_step else []
            write_text(path, "".join(json.dumps(e) + "\n" for e in kept))

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.trainer.state.global_step, **entry}) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        self._append("metrics", {k: v for k, v in logs.items() if k not in (*_TIMES, "epoch")})
        if times := {k: round(v, 3) for k, v in logs.items() if k in _TIMES}:
            self._append("times", times)
        if "reward" in logs:
            for completion in self.trainer.completions:
                self._append("completions", completion)
