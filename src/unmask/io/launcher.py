"""The environment variables that torchrun and accelerate set."""

from __future__ import annotations

import os


def rank() -> int:
    """0 in a single process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes; ``WORLD_SIZE`` alone asks what so many would do."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return world_size() > 1 and "RANK" in os.environ


def local_rank() -> int:
    """The rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def sharding_engine() -> str | None:
    """FSDP or DeepSpeed, where ``accelerate launch`` (or TrainingArguments) chose one of them."""
    chosen = [e for e in ("FSDP", "DeepSpeed") if os.environ.get(f"ACCELERATE_USE_{e.upper()}", "").lower() == "true"]
    return chosen[0] if chosen else None
