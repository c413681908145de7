"""An evaluation on several processes, started by torchrun or accelerate, which end all when one fails.

They exchange a few small objects over gloo, also where each has a GPU: nothing that waits occupies one.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from unmask.errors import UserError
from unmask.io.launcher import is_launched, local_rank

T = TypeVar("T")
TIMEOUT = timedelta(days=7)  # processes finish at different times; a dead one is noticed at once


class AgreedError(UserError):
    """A UserError that every process (still there) raises, whichever of them met it."""


@dataclass(frozen=True)
class Processes:
    """This process among ``world``; alone, everything below is free."""

    rank: int = 0
    world: int = 1
    group: Any = None

    def gather(self, value: T) -> list[T]:
        """What every process passes, by rank, once all are here. Raises AgreedError where one has ended."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, value, group=self.group)
        except RuntimeError:
            said = "another process of this evaluation ended: what is written stays, and the same command resumes it"
            raise AgreedError(said) from None
        return found

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """A UserError of the block on any process ends it on all, with the AgreedError of the lowest rank that has one."""
        error = ""
        try:
            yield
        except UserError as mistake:
            if self.world == 1:
                raise
            error = str(mistake)
        if first := next(filter(None, self.gather(error)), None):
            raise AgreedError(first)

    def on_rank0(self, action: Callable[[], T]) -> T:
        """``action()`` of rank 0, which alone runs it; the result, or its UserError, on every process."""
        result: Any = None
        with self.sync_errors():
            if self.rank == 0:
                result = action()
        return self.gather(result)[0]

    def exit_after_rank0(self) -> None:
        """After an AgreedError: only rank 0 returns, to print it; the others exit once it has, lest the launcher kills it."""
        if self.rank:
            with suppress(UserError):
                self.gather(None)
            raise SystemExit(2)


@cache
def init_distributed() -> Processes:
    """This process's place among those that a launcher started; alone, no process group is made."""
    if not is_launched():
        return Processes()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=TIMEOUT))


def take_own_gpu() -> None:
    """Make device ``cuda`` this process's GPU; more processes than GPUs share them in turn."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
