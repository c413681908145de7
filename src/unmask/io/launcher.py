"""This process among those that torchrun or accelerate started, as the environment tells it."""

from __future__ import annotations

import os


def rank() -> int:
    """0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes; ``WORLD_SIZE`` alone asks what so many would do."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether a launcher started this process beside others."""
    return world_size() > 1 and "RANK" in os.environ


def local_rank() -> int:
    """The place on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
