"""Reinforcement learning with group-relative policy optimization, along recorded trajectories or around them."""
