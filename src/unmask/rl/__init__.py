"""Reinforcement learning with group-relative policy optimisation, along recorded trajectories or around them."""

from unmask.rl.config import TrajectoryGRPOConfig
from unmask.rl.trainer import TrajectoryGRPOTrainer

__all__ = ["TrajectoryGRPOConfig", "TrajectoryGRPOTrainer"]
