"""``unmask rl``: one run from a configuration file to a plain checkpoint, resumable at any point."""

from __future__ import annotations

from pathlib import Path

from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.run_log import RunLog
from unmask.rl.trainer import DiffusionGRPOTrainer
from unmask.training.run_folder import run


def train(config: DiffusionGRPOConfig) -> Path:
    """Run, or resume from the run folder's newest checkpoint; returns the folder of the final plain checkpoint."""
    trainer = DiffusionGRPOTrainer(str(config.model), None, config)
    trainer.add_callback(RunLog(trainer))
    return run(trainer)
