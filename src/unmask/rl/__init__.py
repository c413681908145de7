"""Reinforcement learning with group-relative policy optimisation, along recorded trajectories or around them."""
