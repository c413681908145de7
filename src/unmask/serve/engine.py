"""Continuous batching: one thread that owns the model; completions join and leave its batch at every forward pass."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from unmask.decoding.canvas import Canvases
from unmask.decoding.decode import start
from unmask.decoding.decoder import APPROXIMATE, Decoder
from unmask.decoding.generate import PreparedRow, until
from unmask.decoding.loop import DecodingLoop, Pass, read_together
from unmask.decoding.sampling import Candidates
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM

log = logging.getLogger("unmask.serve")


class QueueFull(Exception):
    """More completions wait than the queue takes."""


class Stopping(Exception):
    """The engine ends."""


class DeadlineExceeded(Exception):
    """A completion was not finished in the time it was given."""


@dataclass(frozen=True)
class Step:
    """What one step committed: ``cells`` (column, token id, log-probability); columns from ``horizon`` on were not open.

    ``text``: what is final from the left, as far as no later commit and no stop string can change it.
    """

    step: int
    cells: list[tuple[int, int, float]]
    horizon: int
    text: str


@dataclass(frozen=True)
class Done:
    """A completion: its text up to its first end token or stop string, and its trajectory (one row, on the CPU)."""

    text: str
    reason: Literal["stop", "length"]
    trajectory: Trajectory


Event = Step | Done | Exception


@dataclass(eq=False)
class Completion:
    """One row to decode, and where its events go: every ``Step`` if ``steps``, then one ``Done`` or exception.

    ``put`` is called from the engine's thread. ``cancelled`` may be set from any: the row leaves at the next pass.
    """

    row: PreparedRow
    decoder: Decoder
    """``within`` the model's blocks, its canvas length that of the row."""
    seed: int
    put: Callable[[Event], None]
    stop: Sequence[str] = ()
    limit: int | None = None
    """The text is cut after so many tokens, where the canvas is longer."""
    steps: bool = False
    deadline: float = float("inf")
    """Of ``time.monotonic``, in seconds."""
    cancelled: bool = False
    canvas: list[int] = field(default_factory=list)
    text: str = ""
    final: int = 0  # columns that are committed, from the left without a gap
    last_step: int = -1

    @property
    def watched(self) -> bool:
        """Whether every pass is looked at: for a stream, or for what ends the row early."""
        return self.steps or bool(self.stop) or self.limit is not None

    @cached_property
    def key(self) -> tuple[Decoder, int]:
        """Completions with the same key can be rows of one loop."""
        return self.decoder.replace(name=""), len(self.row.canvas)

    def commit(self, lm: MaskedLM, step: int, cells: list[tuple[int, int, float]], horizon: int) -> tuple[Step, bool]:
        """Take in what a step committed; returns that with the text that is final, and whether nothing can follow it."""
        self.last_step, length = step, len(self.canvas)
        for column, token, _ in cells:
            self.canvas[column] = token
        while self.final < length and self.canvas[self.final] != lm.mask_id:
            self.final += 1
        whole = self.row.text(lm, torch.tensor([self.canvas[: self.final][: self.limit]]))
        complete = self.final >= (self.limit or length)
        if not complete:
            whole = whole.rstrip("\ufffd")  # half a character
        text = until(whole, self.stop)
        ended = complete or text != whole
        if not ended:
            begun = [
                n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])
            ]
            text = text[: len(text) - max(begun, default=0)]
        if text.startswith(self.text):
            self.text = text
        return Step(step, cells, horizon, self.text), ended


class Group:
    """The rows of one decoder and canvas length, and their loop."""

    def __init__(self, lm: MaskedLM, decoder: Decoder, length: int) -> None:
        self.lm, self.decoder = lm, decoder
        self.loop = DecodingLoop(lm, decoder, early_stop=not length)
        self.rows: Canvases | None = None
        self.members: dict[int, Completion] = {}

    @property
    def takes_no_more(self) -> bool:
        """An approximate cache is made for rows of one block: others wait until these are done."""
        return self.rows is not None and self.decoder.cache in APPROXIMATE

    @property
    def shares_passes(self) -> bool:
        return self.decoder.cache == "none" and not self.decoder.cfg_scale

    def join(self, completions: dict[int, Completion]) -> None:
        lm, length = self.lm, max(len(c.row.canvas) for c in completions.values())
        prompts = [c.row.prompt for c in completions.values()]
        ids, mask = lm.encode(prompts, length or self.decoder.max_new_tokens, empty=bool(length))
        canvas = torch.tensor([c.row.canvas for c in completions.values()], device=ids.device) if length else None
        seeds = torch.tensor([c.seed for c in completions.values()])
        fresh = start(lm, ids, mask, self.decoder, seeds, canvas, [*completions])
        for completion, row in zip(completions.values(), fresh.canvas.tolist(), strict=True):
            completion.canvas = row
        self.rows = fresh if self.rows is None else self.rows.join(fresh, lm.pad_id)
        self.members |= completions

    def leave(self, places: list[int]) -> tuple[list[Completion], Canvases]:
        """Take rows out; returns whose they are, and the rows."""
        assert self.rows is not None
        stay, gone = self.loop.split(self.rows, places)
        self.rows = stay if self.takes_no_more or not len(stay) else stay.drop_padding()
        return [self.members.pop(number) for number in gone.numbers], gone


class Engine:
    """Decodes completions on a thread of its own, at most ``max_batch`` rows a pass; at most ``max_queue`` more may wait.

    Rows of equal decoder and canvas length are one loop; loops without a cache and guidance share their forward passes. A row's
    tokens depend on nothing but its prompt, decoder and seed.
    """

    def __init__(self, lm: MaskedLM, max_batch: int = 32, max_queue: int = 256) -> None:
        self.lm, self.max_batch, self.max_queue = lm, max_batch, max_queue
        self.on_pass: Callable[[float, int], None] = lambda seconds, rows: None
        self.waiting: deque[Completion] = deque()
        self.work: deque[tuple[Iterator[None], Future[Any]]] = deque()
        self.groups: dict[tuple[Decoder, int], Group] = {}
        self.changed, self.stopping, self.count = threading.Condition(), False, 0
        self.thread = threading.Thread(target=self._run, name="unmask-engine", daemon=True)
        self.thread.start()

    @property
    def running(self) -> int:
        """Rows of the batch."""
        return sum(len(group.members) for group in list(self.groups.values()))

    def submit(self, completions: Sequence[Completion]) -> None:
        """All of them or none. Raises QueueFull, and Stopping."""
        with self.changed:
            room = self.max_queue + self.max_batch - self.running
            if self.stopping:
                raise Stopping
            if len(self.waiting) + len(completions) > room:
                raise QueueFull
            self.waiting.extend(completions)
            self.changed.notify()

    def call(self, work: Generator[None, None, Any]) -> Future[Any]:
        """Run a generator on the engine's thread, a piece between two passes; the future holds what it returns.

        Raises QueueFull, and Stopping. A cancelled future ends it at the next piece.
        """
        future: Future[Any] = Future()
        with self.changed:
            if self.stopping:
                raise Stopping
            if len(self.work) >= self.max_queue:
                raise QueueFull
            self.work.append((work, future))
            self.changed.notify()
        return future

    def stop(self) -> None:
        """End the thread; what is unfinished fails."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join(30)  # it is in the middle of a pass

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.groups or self.work or self.stopping):
                    self.changed.wait()
                if self.stopping:
                    break
            self._drop_unwanted()
            self._admit()
            shared = [group for group in self.groups.values() if group.shares_passes]
            for groups in [shared] * bool(shared) + [[g] for g in self.groups.values() if not g.shares_passes]:
                self._advance(groups)
            self._continue_work()
        for completion in (*self.waiting, *(c for group in self.groups.values() for c in group.members.values())):
            completion.put(Stopping())
        for _, future in self.work:
            future.cancel()

    @contextmanager
    def _containing(self, groups: Sequence[Group]) -> Iterator[None]:
        """A fault of the model, or of this code, ends the rows that it met, and nothing else."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a forward pass failed")
            for completion in (c for group in groups for c in group.members.values()):
                completion.put(error)
            for group in groups:
                group.members = {}
        self.groups = {key: group for key, group in self.groups.items() if group.members}

    def _drop_unwanted(self) -> None:
        """Take out what nobody waits for any more, and that whose time is over."""

        def unwanted(completion: Completion) -> bool:
            if late := time.monotonic() > completion.deadline:
                completion.put(DeadlineExceeded())
            return late or completion.cancelled

        with self.changed:
            self.waiting = deque(c for c in self.waiting if not unwanted(c))
        for group in list(self.groups.values()):
            assert group.rows is not None
            gone = [i for i, number in enumerate(group.rows.numbers) if unwanted(group.members[number])]
            with self._containing([group]):
                if gone:
                    group.leave(gone)

    def _admit(self) -> None:
        """Let waiting completions join, the oldest first, while there is room."""
        room, later = self.max_batch - self.running, []
        joining: dict[tuple[Decoder, int], dict[int, Completion]] = {}
        with self.changed:
            while self.waiting and room:
                completion = self.waiting.popleft()
                group = self.groups.get(completion.key)
                if group is not None and group.takes_no_more:
                    later.append(completion)
                    continue
                room, self.count = room - 1, self.count + 1
                joining.setdefault(completion.key, {})[self.count] = completion
            self.waiting.extendleft(reversed(later))
        for (decoder, length), completions in joining.items():
            known = self.groups.get((decoder, length))
            try:
                group = known or Group(self.lm, decoder, length)
                group.join(completions)
                self.groups[decoder, length] = group
            except Exception as error:
                if not isinstance(error, UserError):
                    log.exception("a completion could not begin")
                for completion in completions.values():
                    completion.put(error)

    @torch.no_grad()
    def _advance(self, groups: Sequence[Group]) -> None:
        """One forward pass of some groups, and what it finishes."""
        began, count = time.perf_counter(), sum(len(group.members) for group in groups)
        ready: list[tuple[Group, Canvases, Pass]] = []
        for group in groups:
            with self._containing([group]):
                assert group.rows is not None
                ready.append((group, group.rows, group.loop.prepare(group.rows)))
        found: list[Candidates] = []
        with self._containing([group for group, _, _ in ready]):
            if len(ready) == 1:
                ((group, rows, now),) = ready
                found = [group.loop.read(rows, now)]
            elif ready:
                found = read_together(self.lm, [(rows, now) for _, rows, now in ready])
        for (group, rows, now), candidates in zip(ready, found, strict=False):  # (none where the pass failed)
            with self._containing([group]):
                group.loop.finish(rows, now, candidates)
                if leave := sorted({*group.loop.finished(rows), *self._show(group, rows, now)}):
                    self._finish(*group.leave(leave))
        self.on_pass(time.perf_counter() - began, count)

    def _show(self, group: Group, rows: Canvases, now: Pass) -> list[int]:
        """Tell who watches what the pass committed; returns the places of rows whose text has ended."""
        members = [group.members[number] for number in rows.numbers]  # (a row that waits for others takes no step)
        places = [i for i, c in enumerate(members) if c.watched and rows.passes[i] - 1 > c.last_step]
        if not places:
            return []
        some = torch.tensor(places, device=rows.ids.device)
        steps = rows.at[some] - 1
        row, column = at = (rows.step[some] == steps[:, None]).nonzero(as_tuple=True)
        cells: list[list[tuple[int, int, float]]] = [[] for _ in places]
        new = (row, column, rows.canvas[some][at], rows.logprob[some][at])
        for i, *cell in zip(*(values.tolist() for values in new), strict=True):
            cells[i].append((cell[0], cell[1], cell[2]))
        horizons = (now.open[some] * torch.arange(1, rows.length + 1, device=some.device)).amax(1)
        stopped = []
        for place, step, committed, horizon in zip(places, steps.tolist(), cells, horizons.tolist(), strict=True):
            completion = members[place]
            shown, ended = completion.commit(self.lm, step, committed, horizon)
            if ended:
                stopped.append(place)
            if completion.steps:
                completion.put(shown)
        return stopped

    def _finish(self, completions: Sequence[Completion], rows: Canvases) -> None:
        """Tell those whose rows have left what came of them."""
        try:
            found = rows.trajectory(self.lm.mask_id, {}).to("cpu")
            for i, completion in enumerate(completions):
                row = replace(found.take(torch.tensor([i])), decoder=completion.decoder.config())
                tokens = row.tokens[:, : completion.limit]
                whole = completion.row.text(self.lm, tokens)
                text = until(whole, completion.stop)
                ended = text != whole or bool(completion.row.canvas) or int(self.lm.lengths(tokens)) < tokens.shape[1]
                completion.put(Done(text, "stop" if ended else "length", row))
        except Exception as error:
            for completion in completions:
                completion.put(error)
            raise

    def _continue_work(self) -> None:
        """A piece of the oldest call."""
        if not self.work:
            return
        work, future = self.work[0]
        try:
            if not future.cancelled():
                return next(work)
        except StopIteration as end:
            if future.set_running_or_notify_cancel():
                future.set_result(end.value)
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a call failed")
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        with self.changed:
            self.work.popleft()
